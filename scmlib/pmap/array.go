// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"fmt"

	"github.com/nhybrid/nhybrid/scmlib"
)

// ArrayHead is the persistent part of an array.
type ArrayHead struct {
	data scmlib.Off
	len  uint64
}

// Array is a row of T whose length changes seldom.
type Array[T any] struct {
	r    *scmlib.Region
	head scmlib.Ptr[ArrayHead]
}

// NewArray binds a head to its region. It fails if T cannot live in one.
func NewArray[T any](r *scmlib.Region, head scmlib.Ptr[ArrayHead]) (*Array[T], error) {
	if err := scmlib.CheckType[T](); err != nil {
		return nil, err
	}
	return &Array[T]{r, head}, nil
}

// Len is the number of elements.
func (a *Array[T]) Len() int { return int(a.head.In(a.r).len) }

// All is the elements, in the region. Name what is changed to Tx.Add. The slice is valid until Resize.
func (a *Array[T]) All() []T {
	h := a.head.In(a.r)
	return ptr[T](h.data).Slice(a.r, int(h.len))
}

// Set changes elements in one transaction: one fence for the undo log, however many they are.
func (a *Array[T]) Set(tx *scmlib.Tx, v T, at ...int) error {
	all := a.All()
	var buf [16]*T
	ps := buf[:0]
	for _, i := range at {
		if i < 0 || i >= len(all) {
			return fmt.Errorf("element %d of %d: %w", i, len(all), scmlib.ErrRange)
		}
		ps = append(ps, &all[i])
	}
	if err := scmlib.AddAll(tx, ps...); err != nil {
		return err
	}
	for _, p := range ps {
		*p = v
	}
	return nil
}

// Resize changes the length. New elements are zero. It copies the array.
func (a *Array[T]) Resize(tx *scmlib.Tx, n int) error {
	h := a.head.In(a.r)
	next := ArrayHead{len: uint64(n)}
	old := a.All()
	if n > 0 {
		p, err := scmlib.NewSlice[T](tx, n)
		if err != nil {
			return err
		}
		copy(p.Slice(a.r, n), old)
		next.data = p.Off()
	}
	if h.data != 0 {
		if err := tx.Free(h.data); err != nil {
			return err
		}
	}
	return scmlib.Set(tx, h, next)
}
