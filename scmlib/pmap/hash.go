// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"unsafe"

	"github.com/nhybrid/nhybrid/scmlib"
)

// HashKey is what a hash map is keyed by: values without padding, so that equal keys have equal bytes.
type HashKey interface {
	~uint32 | ~int32 | ~uint64 | ~int64 | ~[8]byte | ~[16]byte | ~[32]byte
}

// HashHead is the persistent part of a hash map: linear hashing (Litwin, 1980). There are level doublings done, and split buckets of the next; directory
// entry 0 has the first bucketsMin buckets, entry i the next bucketsMin<<(i-1). An insert splits at most one bucket, so no transaction is long.
type HashHead struct {
	count uint64
	level uint64
	split uint64
	dir   [40]scmlib.Off
}

const (
	bucketSlots = 8
	bucketsMin  = 16
	bucketLoad  = 5 // entries a bucket, on average, at which buckets are added
)

type bucket[K HashKey, V any] struct {
	used uint64
	next scmlib.Off // when all slots are taken
	fp   [bucketSlots]uint8
	_    [40]byte
	keys [bucketSlots]K
	vals [bucketSlots]V
}

// Hash is an unordered map.
type Hash[K HashKey, V any] struct {
	r    *scmlib.Region
	head scmlib.Ptr[HashHead]
}

// NewHash binds a head to its region. It fails if V cannot live in one.
func NewHash[K HashKey, V any](r *scmlib.Region, head scmlib.Ptr[HashHead]) (*Hash[K, V], error) {
	if err := scmlib.CheckType[V](); err != nil {
		return nil, err
	}
	return &Hash[K, V]{r, head}, nil
}

func hashOf[K HashKey](k *K) uint64 {
	b := unsafe.Slice((*byte)(unsafe.Pointer(k)), unsafe.Sizeof(*k))
	h := uint64(len(b))
	for ; len(b) >= 8; b = b[8:] {
		h = mix(h ^ binary.LittleEndian.Uint64(b) + 0x9e3779b97f4a7c15)
	}
	if len(b) == 4 {
		h = mix(h ^ uint64(binary.LittleEndian.Uint32(b)) + 0x9e3779b97f4a7c15)
	}
	return h
}

// Len is the number of entries.
func (m *Hash[K, V]) Len() int { return int(m.head.In(m.r).count) }

// index is the bucket that a hash belongs to.
func (h *HashHead) index(hash uint64) uint64 {
	n := uint64(bucketsMin) << h.level
	if i := hash & (n - 1); i >= h.split {
		return i
	}
	return hash & (2*n - 1)
}

func (m *Hash[K, V]) bucket(h *HashHead, i uint64) (*bucket[K, V], scmlib.Off) {
	d := bits.Len64(i / bucketsMin)
	if d >= len(h.dir) {
		panic(&scmlib.PtrError{Off: m.head.Off(), Size: i})
	}
	if d > 0 {
		i -= bucketsMin << (d - 1)
	}
	off := h.dir[d] + scmlib.Off(i)*scmlib.Off(unsafe.Sizeof(bucket[K, V]{}))
	if h.dir[d] == 0 {
		off = 0
	}
	return at[bucket[K, V]](m.r, off), off
}

func (b *bucket[K, V]) find(k *K, fp uint8) int {
	for u := b.used & (1<<bucketSlots - 1); u != 0; u &= u - 1 {
		if i := bits.TrailingZeros64(u); b.fp[i] == fp && b.keys[i] == *k {
			return i
		}
	}
	return -1
}

// seek finds an entry, its bucket, and the link that leads to that bucket (nil if it is the first of its chain).
func (m *Hash[K, V]) seek(h *HashHead, k *K) (b *bucket[K, V], off scmlib.Off, i int, link *scmlib.Off) {
	hash := hashOf(k)
	b, off = m.bucket(h, h.index(hash))
	for {
		if i := b.find(k, uint8(hash>>56)); i >= 0 {
			return b, off, i, link
		}
		if b.next == 0 {
			return nil, 0, -1, nil
		}
		link, off = &b.next, b.next
		b = at[bucket[K, V]](m.r, off)
	}
}

// Get is the value of k.
func (m *Hash[K, V]) Get(k K) (v V, ok bool) {
	h := m.head.In(m.r)
	if h.dir[0] == 0 {
		return v, false
	}
	if b, _, i, _ := m.seek(h, &k); b != nil {
		return b.vals[i], true
	}
	return v, false
}

// Put sets the value of k.
func (m *Hash[K, V]) Put(tx *scmlib.Tx, k K, v V) error {
	h := m.head.In(m.r)
	if h.dir[0] == 0 {
		p, err := scmlib.NewSlice[bucket[K, V]](tx, bucketsMin)
		if err != nil {
			return err
		}
		if err := scmlib.Set(tx, &h.dir[0], p.Off()); err != nil {
			return err
		}
	}
	if b, _, i, _ := m.seek(h, &k); b != nil {
		return scmlib.Set(tx, &b.vals[i], v)
	}
	if h.count >= bucketLoad*(bucketsMin<<h.level+h.split) {
		if err := m.grow(tx, h); err != nil {
			return err
		}
	}
	if err := m.insert(tx, h, &k, &v); err != nil {
		return err
	}
	return scmlib.Set(tx, &h.count, h.count+1)
}

// insert puts an entry that is not there into its chain.
func (m *Hash[K, V]) insert(tx *scmlib.Tx, h *HashHead, k *K, v *V) error {
	hash := hashOf(k)
	b, off := m.bucket(h, h.index(hash))
	for b.used == 1<<bucketSlots-1 && b.next != 0 {
		off = b.next
		b = at[bucket[K, V]](m.r, off)
	}
	if b.used == 1<<bucketSlots-1 {
		p, err := scmlib.New[bucket[K, V]](tx)
		if err != nil {
			return err
		}
		if err := scmlib.Set(tx, &b.next, p.Off()); err != nil {
			return err
		}
		off, b = p.Off(), p.In(m.r)
	}
	if err := scmlib.AddAll(tx, &b.used); err != nil {
		return err
	}
	i := bits.TrailingZeros64(^b.used)
	for _, s := range [...]struct {
		at unsafe.Pointer
		n  uintptr
	}{{unsafe.Pointer(&b.fp[i]), 1}, {unsafe.Pointer(&b.keys[i]), unsafe.Sizeof(*k)}, {unsafe.Pointer(&b.vals[i]), unsafe.Sizeof(*v)}} {
		if err := tx.Dirty(off+scmlib.Off(uintptr(s.at)-uintptr(unsafe.Pointer(b))), uint64(s.n)); err != nil {
			return err
		}
	}
	b.keys[i], b.vals[i], b.fp[i] = *k, *v, uint8(hash>>56)
	b.used |= 1 << i
	return nil
}

// grow adds one bucket and moves to it what belongs there.
func (m *Hash[K, V]) grow(tx *scmlib.Tx, h *HashHead) error {
	if h.split == 0 { // a new doubling begins: its buckets
		d := h.level + 1
		if d >= uint64(len(h.dir)) {
			return nil // chains get longer
		}
		p, err := scmlib.NewSlice[bucket[K, V]](tx, bucketsMin<<h.level)
		if err != nil {
			return err
		}
		if err := scmlib.Set(tx, &h.dir[d], p.Off()); err != nil {
			return err
		}
	}
	type entry struct {
		k K
		v V
	}
	old := h.split
	b, off := m.bucket(h, old)
	if err := tx.Add(&h.level, &h.split); err != nil {
		return err
	}
	if h.split++; h.split == bucketsMin<<h.level {
		h.level, h.split = h.level+1, 0
	}
	// The chain is emptied and its entries inserted again: about five of them.
	var all []entry
	for first := true; ; first = false {
		for u := b.used & (1<<bucketSlots - 1); u != 0; u &= u - 1 {
			i := bits.TrailingZeros64(u)
			all = append(all, entry{b.keys[i], b.vals[i]})
		}
		next := b.next
		if first {
			// The whole bucket, as the slots that are freed are used again in this transaction.
			if err := scmlib.AddAll(tx, b); err != nil {
				return err
			}
			b.used, b.next = 0, 0
		} else if err := tx.Free(off); err != nil {
			return err
		}
		if next == 0 {
			break
		}
		off = next
		b = at[bucket[K, V]](m.r, off)
	}
	for i := range all {
		if err := m.insert(tx, h, &all[i].k, &all[i].v); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes k and tells whether it was there.
func (m *Hash[K, V]) Delete(tx *scmlib.Tx, k K) (bool, error) {
	h := m.head.In(m.r)
	if h.dir[0] == 0 {
		return false, nil
	}
	b, off, i, link := m.seek(h, &k)
	if b == nil {
		return false, nil
	}
	if err := tx.Add(&b.used, &h.count); err != nil {
		return true, err
	}
	tx.Keep(off, uint64(unsafe.Sizeof(*b)))
	b.used &^= 1 << i
	h.count--
	if b.used != 0 || link == nil {
		return true, nil
	}
	if err := scmlib.Set(tx, link, b.next); err != nil {
		return true, err
	}
	return true, tx.Free(off)
}

// All lists the entries in no order. The map must not change meanwhile.
func (m *Hash[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		h := m.head.In(m.r)
		if h.dir[0] == 0 {
			return
		}
		for i := range bucketsMin<<h.level + h.split {
			for b, _ := m.bucket(h, i); ; b = at[bucket[K, V]](m.r, b.next) {
				for u := b.used & (1<<bucketSlots - 1); u != 0; u &= u - 1 {
					if s := bits.TrailingZeros64(u); !yield(b.keys[s], b.vals[s]) {
						return
					}
				}
				if b.next == 0 {
					break
				}
			}
		}
	}
}
