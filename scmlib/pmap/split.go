// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"cmp"
	"math/bits"
	"slices"
	"unsafe"

	"github.com/nhybrid/nhybrid/scmlib"
)

// split makes room in the leaf that p belongs to, splitting full inner nodes on the way down, so that each split finds room above.
func (c *core[K, V]) split(tx *scmlib.Tx, h *TreeHead, p *probe[K]) (scmlib.Off, error) {
	if h.depth == 0 || c.inner(h.root).n == innerCap {
		root, err := scmlib.New[inner[K]](tx)
		if err != nil {
			return 0, err
		}
		if err := scmlib.AddAll(tx, h); err != nil {
			return 0, err
		}
		root.In(c.r).kids[0] = h.root
		h.root = root.Off()
		h.depth++
	}
	off := h.root
	for d := h.depth; ; d-- {
		parent := c.inner(off)
		i := parent.route(p)
		kid := parent.kids[i]
		if d > 1 && c.inner(kid).n < innerCap {
			off = kid
			continue
		}
		var right scmlib.Off
		var sep K
		var err error
		if d > 1 {
			right, sep, err = c.splitInner(tx, kid)
		} else {
			right, sep, err = c.splitLeaf(tx, kid)
		}
		if err != nil {
			return 0, err
		}
		n := int(parent.n)
		if err := tx.Add(&parent.n, parent.keys[i:n+1], parent.kids[i+1:n+2]); err != nil {
			return 0, err
		}
		copy(parent.keys[i+1:n+1], parent.keys[i:n])
		copy(parent.kids[i+2:n+2], parent.kids[i+1:n+1])
		parent.keys[i], parent.kids[i+1] = sep, right
		parent.n++
		off = kid
		if p.cmp(sep) <= 0 {
			off = right
		}
		if d == 1 {
			return off, nil
		}
	}
}

func (c *core[K, V]) splitInner(tx *scmlib.Tx, off scmlib.Off) (right scmlib.Off, sep K, err error) {
	rp, err := scmlib.New[inner[K]](tx)
	if err != nil {
		return 0, sep, err
	}
	l, r := c.inner(off), rp.In(c.r)
	if err := scmlib.AddAll(tx, &l.n); err != nil {
		return 0, sep, err
	}
	const mid = innerCap / 2
	copy(r.keys[:], l.keys[mid+1:])
	copy(r.kids[:], l.kids[mid+1:])
	r.n, l.n = innerCap-mid-1, mid
	return rp.Off(), l.keys[mid], nil
}

func (c *core[K, V]) splitLeaf(tx *scmlib.Tx, off scmlib.Off) (right scmlib.Off, sep K, err error) {
	l := c.leaf(off)
	var buf [leafCap]int
	idx := c.sorted(l, &buf)
	half := idx[len(idx)/2:]
	if sep, err = c.dup(tx, l.keys[half[0]]); err != nil {
		return 0, sep, err
	}
	rp, err := scmlib.New[leaf[K, V]](tx)
	if err != nil {
		return 0, sep, err
	}
	if err := scmlib.AddAll(tx, &l.used); err != nil {
		return 0, sep, err
	}
	tx.Keep(off, uint64(unsafe.Sizeof(*l))) // the upper half stays where it is until the commit
	r := rp.In(c.r)
	for j, i := range half {
		r.keys[j], r.vals[j], r.fp[j] = l.keys[i], l.vals[i], l.fp[i]
		r.used |= 1 << j
		l.used &^= 1 << i
	}
	return rp.Off(), sep, nil
}

// sorted lists the slots in use by order of their keys.
func (c *core[K, V]) sorted(l *leaf[K, V], buf *[leafCap]int) []int {
	idx := buf[:0]
	for u := uint32(l.used); u != 0; u &= u - 1 {
		idx = append(idx, bits.TrailingZeros32(u))
	}
	slices.SortFunc(idx, func(a, b int) int { return c.order(l.keys[a], l.keys[b]) })
	return idx
}

// remove takes an entry out. Leaves are given back when they are empty, and never merged: half-empty ones fill again (Johnson and Shasha, 1993).
func (c *core[K, V]) remove(tx *scmlib.Tx, p *probe[K]) (key K, val V, found bool, err error) {
	h := c.head.In(c.r)
	if h.root == 0 {
		return key, val, false, nil
	}
	var buf [maxDepth]step
	off, path := c.descend(h, p, buf[:0])
	l := c.leaf(off)
	i := l.find(p)
	if i < 0 {
		return key, val, false, nil
	}
	key, val = l.keys[i], l.vals[i]
	if err := scmlib.AddAll(tx, &l.used); err != nil {
		return key, val, true, err
	}
	tx.Keep(off, uint64(unsafe.Sizeof(*l)))
	l.used &^= 1 << i
	if l.used != 0 {
		return key, val, true, nil
	}
	return key, val, true, c.prune(tx, h, path, off)
}

// prune frees an empty node, and those above it that thereby lose their last kid.
func (c *core[K, V]) prune(tx *scmlib.Tx, h *TreeHead, path []step, off scmlib.Off) error {
	for {
		if err := tx.Free(off); err != nil {
			return err
		}
		if len(path) == 0 {
			if err := scmlib.AddAll(tx, h); err != nil {
				return err
			}
			*h = TreeHead{}
			return nil
		}
		up := path[len(path)-1]
		path = path[:len(path)-1]
		n := c.inner(up.node)
		if n.n == 0 {
			off = up.node
			continue
		}
		last := int(n.n)
		k := max(up.i-1, 0)
		if err := c.drop(tx, n.keys[k]); err != nil {
			return err
		}
		if err := tx.Add(&n.n, n.keys[k:last], n.kids[up.i:last+1]); err != nil {
			return err
		}
		copy(n.keys[k:last], n.keys[k+1:last])
		copy(n.kids[up.i:last+1], n.kids[up.i+1:last+1])
		n.n--
		return c.lower(tx, h)
	}
}

// lower takes inner nodes with a single kid off the top.
func (c *core[K, V]) lower(tx *scmlib.Tx, h *TreeHead) error {
	for h.depth > 0 {
		n := c.inner(h.root)
		if n.n > 0 {
			return nil
		}
		if err := tx.Free(h.root); err != nil {
			return err
		}
		if err := scmlib.AddAll(tx, h); err != nil {
			return err
		}
		*h = TreeHead{root: n.kids[0], depth: h.depth - 1}
	}
	return nil
}

// scan calls fn for the entries from p on (all, if p is nil), in order, until it returns false.
func (c *core[K, V]) scan(p *probe[K], fn func(K, *V) bool) {
	h := c.head.In(c.r)
	if h.root == 0 {
		return
	}
	if h.depth > maxDepth {
		panic(&scmlib.PtrError{Off: c.head.Off(), Size: h.depth})
	}
	c.walk(h.root, h.depth, p, fn)
}

func (c *core[K, V]) walk(off scmlib.Off, depth uint64, p *probe[K], fn func(K, *V) bool) bool {
	if depth == 0 {
		l := c.leaf(off)
		var buf [leafCap]int
		for _, i := range c.sorted(l, &buf) {
			if (p == nil || p.cmp(l.keys[i]) >= 0) && !fn(l.keys[i], &l.vals[i]) {
				return false
			}
		}
		return true
	}
	n := c.inner(off)
	i := 0
	if p != nil {
		i = n.route(p)
	}
	for ; i <= int(n.n); i++ {
		if !c.walk(n.kids[i], depth-1, p, fn) {
			return false
		}
		p = nil
	}
	return true
}

// clear frees everything. each is called for every key and value that is stored, and every routing copy is dropped.
func (c *core[K, V]) clear(tx *scmlib.Tx, each func(K, *V) error) error {
	h := c.head.In(c.r)
	if h.root == 0 {
		return nil
	}
	if err := c.clearNode(tx, h.root, h.depth, each); err != nil {
		return err
	}
	return scmlib.Set(tx, h, TreeHead{})
}

func (c *core[K, V]) clearNode(tx *scmlib.Tx, off scmlib.Off, depth uint64, each func(K, *V) error) error {
	if depth == 0 {
		l := c.leaf(off)
		for u := uint32(l.used); u != 0; u &= u - 1 {
			i := bits.TrailingZeros32(u)
			if err := each(l.keys[i], &l.vals[i]); err != nil {
				return err
			}
		}
		return tx.Free(off)
	}
	n := c.inner(off)
	for i := range n.n {
		if err := c.drop(tx, n.keys[i]); err != nil {
			return err
		}
	}
	for i := range n.n + 1 {
		if err := c.clearNode(tx, n.kids[i], depth-1, each); err != nil {
			return err
		}
	}
	return tx.Free(off)
}

// mix spreads a 64-bit number (the finalizer of SplitMix64).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func compareU64(a, b uint64) int { return cmp.Compare(a, b) }
