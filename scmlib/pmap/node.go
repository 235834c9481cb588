// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pmap holds persistent structures in a region of scmlib: an ordered map (B-tree), a hash map, an append log and an array.
//
// Each has a head, a small struct that the program embeds in its root object or allocates; zeroed, it is an empty structure. A handle binds a head to
// a region; it is cheap and holds no state of its own. Changes take a transaction, so that several structures can change together or not at all.
// Readers and writers of one structure need a lock of the program's, as the rest of a region does.
// A structure that was damaged makes readers panic with *scmlib.PtrError, which Region.View and Region.Update turn into an error.
package pmap

import (
	"encoding/binary"
	"math/bits"
	"unsafe"

	"github.com/nhybrid/nhybrid/scmlib"
)

const (
	leafCap  = 32
	innerCap = 32
	maxDepth = 32
)

// leaf holds entries in no order: to insert sets one bit of one word, and everything else goes to a slot that nobody reads before. So the undo log
// of an insert is 8 bytes. fp holds a byte of each key's hash, to compare few keys.
type leaf[K, V any] struct {
	used uint64
	fp   [leafCap]uint8
	_    [24]byte
	keys [leafCap]K
	vals [leafCap]V
}

// inner routes: keys below keys[i] are in kids[i] or further left, others further right. It has n keys and n+1 kids.
type inner[K any] struct {
	n    uint64
	_    [56]byte
	keys [innerCap]K
	kids [innerCap + 1]scmlib.Off
}

// TreeHead is the persistent part of a tree.
type TreeHead struct {
	root  scmlib.Off
	depth uint64 // inner nodes above a leaf
}

// probe is a key that is looked for: its hash, and how a stored key compares with it.
type probe[K any] struct {
	fp  uint8
	cmp func(stored K) int
}

// core is a B+ tree over fixed-size keys. What the keys mean is up to order, dup and drop.
type core[K, V any] struct {
	r     *scmlib.Region
	head  scmlib.Ptr[TreeHead]
	order func(a, b K) int
	fp    func(K) uint8
	dup   func(*scmlib.Tx, K) (K, error) // a copy to route by, which lives longer than the entry
	drop  func(*scmlib.Tx, K) error      // a copy is no longer needed
}

func ptr[T any](off scmlib.Off) scmlib.Ptr[T] {
	p, err := scmlib.PtrAt[T](off)
	if err != nil {
		panic(err) // New has checked the type
	}
	return p
}

func (c *core[K, V]) leaf(off scmlib.Off) *leaf[K, V] { return at[leaf[K, V]](c.r, off) }
func (c *core[K, V]) inner(off scmlib.Off) *inner[K] {
	n := at[inner[K]](c.r, off)
	if n.n > innerCap {
		panic(&scmlib.PtrError{Off: off, Size: n.n})
	}
	return n
}

// at is the T at off, which must not be nil.
func at[T any](r *scmlib.Region, off scmlib.Off) *T {
	p := ptr[T](off).In(r)
	if p == nil {
		panic(&scmlib.PtrError{Off: off, Size: uint64(unsafe.Sizeof(*p))})
	}
	return p
}

// find is the slot of a key, or -1. Fingerprints are compared eight at a time.
func (l *leaf[K, V]) find(p *probe[K]) int {
	pattern := 0x0101010101010101 * uint64(p.fp)
	for w := 0; w < leafCap; w += 8 {
		x := binary.LittleEndian.Uint64(l.fp[w:]) ^ pattern
		// A byte of x is zero where the fingerprint is equal. The highest bit of such bytes; borrows may mark a byte too many, never too few.
		hit := (x - 0x0101010101010101) &^ x & 0x8080808080808080
		for ; hit != 0; hit &= hit - 1 {
			i := w + bits.TrailingZeros64(hit)/8
			if l.used>>i&1 == 1 && p.cmp(l.keys[i]) == 0 {
				return i
			}
		}
	}
	return -1
}

func (n *inner[K]) route(p *probe[K]) int {
	lo, hi := 0, int(n.n)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if p.cmp(n.keys[mid]) <= 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

type step struct {
	node scmlib.Off
	i    int
}

// descend finds the leaf for a key. The tree is not empty. A depth that no region can hold is damage.
func (c *core[K, V]) descend(h *TreeHead, p *probe[K], path []step) (scmlib.Off, []step) {
	if h.depth > maxDepth {
		panic(&scmlib.PtrError{Off: c.head.Off(), Size: h.depth})
	}
	off := h.root
	for range h.depth {
		n := c.inner(off)
		i := n.route(p)
		if path != nil {
			path = append(path, step{off, i})
		}
		off = n.kids[i]
	}
	return off, path
}

func (c *core[K, V]) get(p *probe[K]) (v *V) {
	h := c.head.In(c.r)
	if h.root == 0 {
		return nil
	}
	off, _ := c.descend(h, p, nil)
	l := c.leaf(off)
	if i := l.find(p); i >= 0 {
		return &l.vals[i]
	}
	return nil
}

// slot makes room for a key and returns its value: the old one, already under undo, or a new one. mk makes the key to store.
func (c *core[K, V]) slot(tx *scmlib.Tx, p *probe[K], mk func() (K, error)) (v *V, found bool, err error) {
	h := c.head.In(c.r)
	if h.root == 0 {
		l, err := scmlib.New[leaf[K, V]](tx)
		if err != nil {
			return nil, false, err
		}
		if err := scmlib.AddAll(tx, h); err != nil {
			return nil, false, err
		}
		*h = TreeHead{root: l.Off()}
	}
	off, _ := c.descend(h, p, nil)
	l := c.leaf(off)
	if i := l.find(p); i >= 0 {
		return &l.vals[i], true, scmlib.AddAll(tx, &l.vals[i])
	}
	if uint32(l.used) == 1<<leafCap-1 {
		if off, err = c.split(tx, h, p); err != nil {
			return nil, false, err
		}
		l = c.leaf(off)
	}
	key, err := mk()
	if err != nil {
		return nil, false, err
	}
	i := bits.TrailingZeros32(^uint32(l.used))
	if err := scmlib.AddAll(tx, &l.used); err != nil {
		return nil, false, err
	}
	base := uintptr(unsafe.Pointer(l))
	for _, s := range [...]struct{ at, n uintptr }{
		{uintptr(unsafe.Pointer(&l.fp[i])) - base, 1},
		{uintptr(unsafe.Pointer(&l.keys[i])) - base, unsafe.Sizeof(key)},
		{uintptr(unsafe.Pointer(&l.vals[i])) - base, unsafe.Sizeof(l.vals[i])},
	} {
		if err := tx.Dirty(off+scmlib.Off(s.at), uint64(s.n)); err != nil {
			return nil, false, err
		}
	}
	l.keys[i], l.fp[i] = key, p.fp
	l.used |= 1 << i
	return &l.vals[i], false, nil
}
