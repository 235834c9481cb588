// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"iter"

	"github.com/nhybrid/nhybrid/scmlib"
)

// Tree is an ordered map from uint64 to V.
type Tree[V any] struct{ core[uint64, V] }

// NewTree binds a head to its region. It fails if V cannot live in one.
func NewTree[V any](r *scmlib.Region, head scmlib.Ptr[TreeHead]) (*Tree[V], error) {
	if err := scmlib.CheckType[V](); err != nil {
		return nil, err
	}
	return &Tree[V]{core[uint64, V]{r: r, head: head, order: compareU64, fp: fpU64,
		dup:  func(_ *scmlib.Tx, k uint64) (uint64, error) { return k, nil },
		drop: func(*scmlib.Tx, uint64) error { return nil }}}, nil
}

func fpU64(k uint64) uint8 { return uint8(mix(k)) }

func probeU64(k uint64) probe[uint64] {
	return probe[uint64]{fpU64(k), func(s uint64) int {
		if s < k {
			return -1
		} else if s > k {
			return 1
		}
		return 0
	}}
}

// Get is the value of k.
func (t *Tree[V]) Get(k uint64) (v V, ok bool) {
	p := probeU64(k)
	if at := t.get(&p); at != nil {
		return *at, true
	}
	return v, false
}

// Put sets the value of k.
func (t *Tree[V]) Put(tx *scmlib.Tx, k uint64, v V) error {
	p := probeU64(k)
	at, _, err := t.slot(tx, &p, func() (uint64, error) { return k, nil })
	if err == nil {
		*at = v
	}
	return err
}

// Delete removes k and tells whether it was there.
func (t *Tree[V]) Delete(tx *scmlib.Tx, k uint64) (bool, error) {
	p := probeU64(k)
	_, _, found, err := t.remove(tx, &p)
	return found, err
}

// From lists the entries whose key is at least k, in order. The tree must not change meanwhile.
func (t *Tree[V]) From(k uint64) iter.Seq2[uint64, V] {
	return func(yield func(uint64, V) bool) {
		p := probeU64(k)
		t.scan(&p, func(k uint64, v *V) bool { return yield(k, *v) })
	}
}

// Clear removes everything.
func (t *Tree[V]) Clear(tx *scmlib.Tx) error {
	return t.clear(tx, func(uint64, *V) error { return nil })
}
