// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

// things is the root of the structures' scenarios.
type things struct {
	Tree, Bytes pmap.TreeHead
	Log         pmap.LogHead
	Array       pmap.ArrayHead
	Hash        pmap.HashHead
}

type handles struct {
	tree  *pmap.Tree[uint64]
	bytes *pmap.BytesTree
	log   *pmap.Log
	array *pmap.Array[uint32]
	hash  *pmap.Hash[uint64, uint64]
}

func open(r *scmlib.Region) (h handles, err error) {
	t := root[things](r)
	place := func(p any) scmlib.Off {
		var off scmlib.Off
		switch p := p.(type) {
		case *pmap.TreeHead:
			off, err = scmlib.OffsetOf(r, p)
		case *pmap.LogHead:
			off, err = scmlib.OffsetOf(r, p)
		case *pmap.ArrayHead:
			off, err = scmlib.OffsetOf(r, p)
		case *pmap.HashHead:
			off, err = scmlib.OffsetOf(r, p)
		}
		if err != nil {
			panic(err)
		}
		return off
	}
	tp, _ := scmlib.PtrAt[pmap.TreeHead](place(&t.Tree))
	bp, _ := scmlib.PtrAt[pmap.TreeHead](place(&t.Bytes))
	lp, _ := scmlib.PtrAt[pmap.LogHead](place(&t.Log))
	ap, _ := scmlib.PtrAt[pmap.ArrayHead](place(&t.Array))
	hp, _ := scmlib.PtrAt[pmap.HashHead](place(&t.Hash))
	var e1, e2, e3 error
	h.tree, e1 = pmap.NewTree[uint64](r, tp)
	h.bytes = pmap.NewBytesTree(r, bp)
	h.log = pmap.NewLog(r, lp)
	h.array, e2 = pmap.NewArray[uint32](r, ap)
	h.hash, e3 = pmap.NewHash[uint64, uint64](r, hp)
	return h, errors.Join(e1, e2, e3)
}

func seeThings(r *scmlib.Region) (string, error) {
	h, err := open(r)
	if err != nil {
		return "", err
	}
	var b []byte
	for k, v := range h.tree.From(0) {
		b = fmt.Appendf(b, "%d=%d ", k, v)
		if got, ok := h.tree.Get(k); !ok || got != v {
			return "", fmt.Errorf("tree: key %d is listed and not found", k)
		}
	}
	for k, v := range h.bytes.From(nil) {
		b = fmt.Appendf(b, "%s=%s ", k, v)
	}
	cur := h.log.From(0)
	for s, v := range cur.All() {
		b = fmt.Appendf(b, "%d:%s ", s, v)
	}
	if cur.Err() != nil {
		return "", cur.Err()
	}
	b = fmt.Append(b, h.array.All(), h.hash.Len(), " ")
	n, sum := 0, uint64(0)
	for k, v := range h.hash.All() {
		n, sum = n+1, sum+k*31+v*17
		if got, ok := h.hash.Get(k); !ok || got != v {
			return "", fmt.Errorf("hash: key %d is listed and not found", k)
		}
	}
	if n != h.hash.Len() {
		return "", fmt.Errorf("hash: %d entries, count says %d", n, h.hash.Len())
	}
	return string(fmt.Append(b, sum)), nil
}

func change(want error, fn func(h handles, tx *scmlib.Tx) error) func(*world) error {
	return func(w *world) error {
		h, err := open(w.r)
		if err != nil {
			return err
		}
		if err := w.r.Update(func(tx *scmlib.Tx) error { return fn(h, tx) }); !errors.Is(err, want) {
			return fmt.Errorf("Update: %w, want %w", err, want)
		}
		return nil
	}
}

func prepare(fn func(h handles, tx *scmlib.Tx) error) func(r *scmlib.Region) error {
	return func(r *scmlib.Region) error {
		h, err := open(r)
		if err != nil {
			return err
		}
		return r.Update(func(tx *scmlib.Tx) error { return fn(h, tx) })
	}
}

func structures() []*scenario {
	no := func(h handles, tx *scmlib.Tx) error { return nil }
	key := func(i int) []byte { return fmt.Appendf(nil, "key number %d", i*7%100) }
	return []*scenario{
		{name: "tree", size: 256 << 10, opts: small, observe: seeThings,
			setup: prepare(func(h handles, tx *scmlib.Tx) error {
				var err error
				for i := range uint64(32) {
					err = errors.Join(err, h.tree.Put(tx, i*10, i))
				}
				return err
			}),
			ops: []func(*world) error{
				change(errNo, func(h handles, tx *scmlib.Tx) error { return errors.Join(h.tree.Put(tx, 15, 1), errNo) }), // splits
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.tree.Put(tx, 15, 1) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.tree.Put(tx, 15, 2) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.tree.Put(tx, 315, 3) }),
				change(errNo, func(h handles, tx *scmlib.Tx) error { // a slot is emptied and filled again
					_, err := h.tree.Delete(tx, 20)
					return errors.Join(err, h.tree.Put(tx, 21, 4), errNo)
				}),
				change(nil, func(h handles, tx *scmlib.Tx) error { _, err := h.tree.Delete(tx, 20); return err }),
				change(nil, func(h handles, tx *scmlib.Tx) error {
					var err error
					for i := range uint64(16) { // empties a leaf
						_, e := h.tree.Delete(tx, 160+i*10)
						err = errors.Join(err, e)
					}
					_, e := h.tree.Delete(tx, 315)
					return errors.Join(err, e)
				}),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.tree.Clear(tx) }),
			}},
		{name: "bytes", size: 256 << 10, opts: small, observe: seeThings,
			setup: prepare(func(h handles, tx *scmlib.Tx) error {
				var err error
				for i := range 32 {
					err = errors.Join(err, h.bytes.Put(tx, key(i), key(i*3)))
				}
				return err
			}),
			ops: []func(*world) error{
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.bytes.Put(tx, key(40), []byte("new")) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.bytes.Put(tx, key(3), []byte("other")) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { _, err := h.bytes.Delete(tx, key(4)); return err }),
				change(errNo, func(h handles, tx *scmlib.Tx) error { return errors.Join(h.bytes.Clear(tx), errNo) }),
			}},
		{name: "log", size: 256 << 10, opts: small, observe: seeThings, setup: prepare(no),
			ops: []func(*world) error{
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.log.Append(tx, []byte("one")) }),
				change(nil, func(h handles, tx *scmlib.Tx) error {
					return errors.Join(h.log.Append(tx, []byte("two, which is longer than a line of the processor's cache has bytes")), h.log.Append(tx, nil))
				}),
				change(errNo, func(h handles, tx *scmlib.Tx) error { return errors.Join(h.log.Append(tx, []byte("never")), errNo) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.log.Append(tx, make([]byte, 16<<10)) }), // another segment
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.log.Trim(tx, 3) }),
			}},
		{name: "array", size: 128 << 10, opts: small, observe: seeThings,
			setup: prepare(func(h handles, tx *scmlib.Tx) error { return h.array.Resize(tx, 40) }),
			ops: []func(*world) error{
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.array.Set(tx, 7, 0, 4, 9, 13, 17, 22, 26, 30, 35, 39) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.array.Resize(tx, 60) }),
				change(scmlib.ErrRange, func(h handles, tx *scmlib.Tx) error {
					return errors.Join(h.array.Set(tx, 1, 2), h.array.Set(tx, 1, 60))
				}),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.array.Resize(tx, 0) }),
			}},
		{name: "hash", size: 512 << 10, opts: small, observe: seeThings,
			setup: prepare(func(h handles, tx *scmlib.Tx) error {
				var err error
				for i := range uint64(79) {
					err = errors.Join(err, h.hash.Put(tx, i, i))
				}
				return err
			}),
			ops: []func(*world) error{
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.hash.Put(tx, 1000, 1) }),
				change(errNo, func(h handles, tx *scmlib.Tx) error { return errors.Join(h.hash.Put(tx, 1001, 1), errNo) }), // splits a bucket
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.hash.Put(tx, 1001, 1) }),
				change(nil, func(h handles, tx *scmlib.Tx) error { return h.hash.Put(tx, 1001, 2) }),
				change(nil, func(h handles, tx *scmlib.Tx) error {
					_, err := h.hash.Delete(tx, 7)
					return errors.Join(err, h.hash.Put(tx, 7, 8))
				}),
				change(nil, func(h handles, tx *scmlib.Tx) error { _, err := h.hash.Delete(tx, 1001); return err }),
			}},
	}
}
