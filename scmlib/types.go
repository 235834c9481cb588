// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"hash/crc64"
	"reflect"
	"sync"
	"unsafe"
)

// Off is a place in a region, in bytes from its start. 0 is nil.
type Off uint64

// Ptr points to a T in a region. It is 8 bytes, may itself be stored in a region, and stays true wherever the region is mapped.
// The zero Ptr is nil. Ptrs come from [New], [Root] and [PtrAt].
type Ptr[T any] struct{ off Off }

// PtrAt makes a Ptr of an offset. It fails with ErrType if T cannot live in a region.
func PtrAt[T any](off Off) (Ptr[T], error) {
	return Ptr[T]{off}, checkType(reflect.TypeFor[T]())
}

// Off is the offset that p stands for.
func (p Ptr[T]) Off() Off { return p.off }

// IsNil tells whether p points nowhere.
func (p Ptr[T]) IsNil() bool { return p.off == 0 }

// In is the address of the T, valid until the region is closed; nil for nil.
// It panics with *PtrError if p does not lie in the heap of r; Update and View return that as an error.
func (p Ptr[T]) In(r *Region) *T {
	if p.off == 0 {
		return nil
	}
	var t T
	n := unsafe.Sizeof(t)
	if !r.inHeap(uint64(p.off), uint64(n)) || uintptr(p.off)%unsafe.Alignof(t) != 0 {
		panic(&PtrError{p.off, uint64(n)})
	}
	return (*T)(r.mem.At(uint64(p.off)))
}

// Slice is the n Ts that start at p. Like In, it panics with *PtrError.
func (p Ptr[T]) Slice(r *Region, n int) []T {
	if p.off == 0 || n == 0 {
		return nil
	}
	var t T
	size := uint64(unsafe.Sizeof(t))
	if n < 0 || size > 0 && uint64(n) > r.mem.Size()/size || !r.inHeap(uint64(p.off), size*uint64(n)) || uintptr(p.off)%unsafe.Alignof(t) != 0 {
		panic(&PtrError{p.off, size * uint64(n)})
	}
	return unsafe.Slice((*T)(r.mem.At(uint64(p.off))), n)
}

var types sync.Map // reflect.Type to error or nil

// CheckType tells whether T may live in a region: no Go pointer anywhere in it. The answer is remembered.
func CheckType[T any]() error { return checkType(reflect.TypeFor[T]()) }

func checkType(t reflect.Type) error {
	if v, ok := types.Load(t); ok {
		err, _ := v.(error)
		return err
	}
	var err error
	if where := pointerIn(t, t.String()); where != "" {
		err = fmt.Errorf("%w: %s: the garbage collector does not see it; use scmlib.Ptr or scmlib.Off", ErrType, where)
	}
	types.Store(t, err)
	return err
}

// pointerIn names the first part of t that the garbage collector would have to follow. A uintptr is refused as well: it is an address that the
// next mapping makes wrong.
func pointerIn(t reflect.Type, path string) string {
	switch t.Kind() {
	case reflect.Bool, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Int,
		reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uint,
		reflect.Float32, reflect.Float64, reflect.Complex64, reflect.Complex128:
		return ""
	case reflect.Array:
		return pointerIn(t.Elem(), path+"[]")
	case reflect.Struct:
		for i := range t.NumField() {
			if f := t.Field(i); f.Type != t {
				if where := pointerIn(f.Type, path+"."+f.Name); where != "" {
					return where
				}
			}
		}
		return ""
	}
	return fmt.Sprintf("%s is a %s", path, t.Kind())
}

var (
	crcTable     = crc64.MakeTable(crc64.ECMA)
	fingerprints sync.Map // reflect.Type to uint64
)

// fingerprint is a number for how a type lies in memory: kinds and offsets, not names, so that a field may be renamed. It is never 0.
func fingerprint(t reflect.Type) uint64 {
	if v, ok := fingerprints.Load(t); ok {
		return v.(uint64) //nolint:forcetypeassert // nothing else is stored there
	}
	h := crc64.New(crcTable)
	var walk func(t reflect.Type, at uintptr)
	walk = func(t reflect.Type, at uintptr) {
		switch t.Kind() {
		case reflect.Struct:
			for i := range t.NumField() {
				walk(t.Field(i).Type, at+t.Field(i).Offset)
			}
		case reflect.Array:
			fmt.Fprintf(h, "[%d@%d/%d:", t.Len(), at, t.Elem().Size())
			walk(t.Elem(), at)
			fmt.Fprint(h, "]")
		default:
			fmt.Fprintf(h, "%s@%d;", t.Kind(), at)
		}
	}
	walk(t, 0)
	fingerprints.Store(t, h.Sum64()|1)
	return h.Sum64() | 1
}
