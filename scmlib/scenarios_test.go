// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"
	"strings"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

// cells is a root whose words lie in lines of their own.
type cells struct {
	A     [12]struct{ V, _, _, _, _, _, _, _ uint64 }
	Block [6]scmlib.Off
	Bulk  scmlib.Off
	Flag  uint64
	Wide  [400]uint64
}

var small = scmlib.Options{Lanes: 2, LaneSize: 1024, ChunkSize: 16 << 10}

func root[T any](r *scmlib.Region) *T {
	p, err := scmlib.Root[T](r)
	if err != nil {
		panic(err)
	}
	return p.In(r)
}

func makeRoot[T any](r *scmlib.Region) error {
	_, err := scmlib.Root[T](r)
	return err
}

func seeCells(r *scmlib.Region) (string, error) {
	c := root[cells](r)
	var b strings.Builder
	for i := range c.A {
		fmt.Fprint(&b, c.A[i].V, " ")
	}
	fmt.Fprint(&b, c.Block, c.Flag, " ")
	for i := range c.Block { // the content of blocks belongs to what is promised
		if c.Block[i] != 0 {
			m, err := r.Bytes(c.Block[i], 64)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(&b, "%x.", m[:8])
		}
	}
	if c.Flag&1 == 1 {
		m, err := r.Bytes(c.Bulk, 3000)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%x", m[:2980])
	}
	h := uint64(0)
	for i, v := range c.Wide {
		h = h*31 + v*uint64(i+1)
	}
	fmt.Fprint(&b, " ", h)
	return b.String(), nil
}

// update is an operation that is one transaction. want is the error it must end with.
func update(want error, fn func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error) func(*world) error {
	return func(w *world) error {
		err := w.r.Update(func(tx *scmlib.Tx) error { return fn(w.r, root[cells](w.r), tx) })
		if !errors.Is(err, want) {
			return fmt.Errorf("Update: %v, want %v", err, want)
		}
		return nil
	}
}

var errNo = errors.New("no")

func bump(tx *scmlib.Tx, c *cells, by uint64, idx ...int) error {
	var ps []*uint64
	for _, i := range idx {
		ps = append(ps, &c.A[i].V)
	}
	if err := scmlib.AddAll(tx, ps...); err != nil {
		return err
	}
	for _, p := range ps {
		*p += by
	}
	return nil
}

// fill writes a pattern to a new block: it is the transaction's to flush.
func fill(r *scmlib.Region, off scmlib.Off, n uint64, b byte) {
	m, err := r.Bytes(off, n)
	if err != nil {
		panic(err)
	}
	for i := range m {
		m[i] = b
	}
}

func alloc(r *scmlib.Region, c *cells, tx *scmlib.Tx, i int, n uint64, b byte) error {
	off, err := tx.Alloc(n)
	if err != nil {
		return err
	}
	fill(r, off, n, b)
	return scmlib.Set(tx, &c.Block[i], off)
}

func release(c *cells, tx *scmlib.Tx, i int) error {
	if err := tx.Free(c.Block[i]); err != nil {
		return err
	}
	return scmlib.Set(tx, &c.Block[i], 0)
}

func scenarios() []*scenario {
	return append([]*scenario{
		{name: "format", size: 64 << 10, opts: small, blank: true,
			observe: func(r *scmlib.Region) (string, error) { return r.Info().Layout, nil },
			ops: []func(*world) error{
				func(w *world) error { return makeRoot[[4]uint64](w.r) },
				func(w *world) error { return w.r.Update(func(*scmlib.Tx) error { return nil }) },
			}},
		{name: "update", size: 64 << 10, opts: small, setup: makeRoot[cells], observe: seeCells,
			ops: []func(*world) error{
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					return bump(tx, c, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
				}),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					if err := bump(tx, c, 5, 0, 1, 2); err != nil {
						return err
					}
					return bump(tx, c, 7, 2, 3)
				}),
				update(errNo, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return errors.Join(bump(tx, c, 9, 1, 2), errNo) }),
				// Another processor goes on where the first has rolled back.
				func(w *world) error { w.tr.Agent(1); return nil },
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return bump(tx, c, 11, 1, 2) }),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return bump(tx, c, 13, 1) }),
			}},
		{name: "long log", size: 128 << 10, opts: small, setup: makeRoot[cells], observe: seeCells,
			ops: []func(*world) error{
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					if err := scmlib.AddAll(tx, &c.Wide); err != nil {
						return err
					}
					for i := range c.Wide {
						c.Wide[i] = uint64(i) + 1
					}
					return bump(tx, c, 1, 0)
				}),
				update(errNo, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					if err := scmlib.AddAll(tx, &c.Wide); err != nil {
						return err
					}
					c.Wide[7], c.Wide[399] = 1, 1
					return errors.Join(bump(tx, c, 1, 0), errNo)
				}),
				// What the log has used is data now.
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return alloc(r, c, tx, 0, 20<<10, 0x11) }),
			}},
		{name: "persist", size: 64 << 10, opts: small, observe: seeCells,
			setup: func(r *scmlib.Region) error {
				return r.Update(func(tx *scmlib.Tx) (err error) {
					c := root[cells](r)
					if err := scmlib.AddAll(tx, &c.Bulk); err != nil {
						return err
					}
					c.Bulk, err = tx.Alloc(3000)
					return err
				})
			},
			ops: []func(*world) error{
				func(w *world) error { return poke(w, 0, 1) },
				func(w *world) error { return poke(w, 1, 2) },
				func(w *world) error { // data past the cache, then the word that makes it count
					c := root[cells](w.r)
					b := []byte(strings.Repeat("0123456789abcdef", 200))[:2980]
					if err := errors.Join(w.r.CopyNT(c.Bulk+3, b[:2890]), w.r.CopyNT(c.Bulk+2975, b[:5]), w.r.Drain()); err != nil {
						return err
					}
					c.Flag = 1
					off, err := scmlib.OffsetOf(w.r, &c.Flag)
					return errors.Join(err, w.r.Flush(off, 8), w.r.Drain())
				},
			}},
		{name: "alloc", size: 256 << 10, opts: small, observe: seeCells,
			setup: func(r *scmlib.Region) error { // chunks that become runs and logs hold rubbish
				var offs []scmlib.Off
				err := r.Update(func(tx *scmlib.Tx) error {
					root[cells](r)
					for range 8 {
						off, err := tx.Alloc(16 << 10)
						if err != nil {
							return err
						}
						fill(r, off, 16<<10, 0xff)
						offs = append(offs, off)
					}
					return nil
				})
				return errors.Join(err, r.Update(func(tx *scmlib.Tx) error {
					for _, o := range offs {
						if err := tx.Free(o); err != nil {
							return err
						}
					}
					return nil
				}))
			},
			ops: []func(*world) error{
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return alloc(r, c, tx, 0, 40, 0x22) }),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					return errors.Join(alloc(r, c, tx, 1, 40, 0x33), alloc(r, c, tx, 2, 100, 0x44))
				}),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return release(c, tx, 0) }),
				update(errNo, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					return errors.Join(release(c, tx, 1), alloc(r, c, tx, 0, 40, 0x55), errNo)
				}),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { // allocated and freed by one transaction
					if err := alloc(r, c, tx, 3, 40, 0x66); err != nil {
						return err
					}
					return errors.Join(release(c, tx, 3), bump(tx, c, 1, 0))
				}),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return alloc(r, c, tx, 4, 30<<10, 0x77) }),
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					return errors.Join(release(c, tx, 4), alloc(r, c, tx, 5, 64, 0x88))
				}),
				// An allocation that nothing but the commit logs.
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					if err := scmlib.AddAll(tx, &c.Block[0]); err != nil {
						return err
					}
					off, err := tx.Alloc(48)
					c.Block[0] = off
					return err
				}),
			}},
		{name: "full", size: 64 << 10, opts: small, observe: seeCells,
			setup: func(r *scmlib.Region) error { // every chunk a run, all but the root's empty
				for _, n := range []uint64{2000, 100} {
					err := r.Update(func(tx *scmlib.Tx) error { return alloc(r, root[cells](r), tx, 0, n, 0xff) })
					if err == nil {
						err = r.Update(func(tx *scmlib.Tx) error { return release(root[cells](r), tx, 0) })
					}
					if err != nil {
						return err
					}
				}
				return nil
			},
			ops: []func(*world) error{
				update(nil, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return alloc(r, c, tx, 0, 16<<10, 0xff) }),
				update(scmlib.ErrFull, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error {
					return errors.Join(bump(tx, c, 1, 0), alloc(r, c, tx, 0, 60<<10, 0x99))
				}),
				update(errNo, func(r *scmlib.Region, c *cells, tx *scmlib.Tx) error { return errors.Join(bump(tx, c, 1, 0), errNo) }),
			}},
		{name: "two lanes", size: 64 << 10, opts: small, setup: makeRoot[cells], observe: seeCells,
			ops: []func(*world) error{overlap(nil), overlap(errNo)}},
	}, structures()...)
}

func poke(w *world, i int, v uint64) error {
	c := root[cells](w.r)
	c.A[i].V = v
	off, err := scmlib.OffsetOf(w.r, &c.A[i].V)
	return errors.Join(err, w.r.Persist(off, 8))
}

// overlap runs one transaction within the life of another, on blocks that share a word of a bitmap.
func overlap(want error) func(w *world) error {
	return func(w *world) error {
		c := root[cells](w.r)
		err := w.r.Update(func(outer *scmlib.Tx) error {
			a, err := outer.Alloc(64)
			if err != nil {
				return err
			}
			// The run that this may have made must be durable before another processor's transaction commits blocks of it.
			w.tr.Agent(1)
			err = w.r.Update(func(inner *scmlib.Tx) error {
				return errors.Join(alloc(w.r, c, inner, 1, 64, 0x12), bump(inner, c, 1, 3))
			})
			if err := errors.Join(err, w.mark()); err != nil {
				return err
			}
			w.tr.Agent(0)
			if err := scmlib.AddAll(outer, &c.Block[0]); err != nil {
				return err
			}
			fill(w.r, a, 64, 0x34)
			c.Block[0] = a
			return want
		})
		if !errors.Is(err, want) {
			return fmt.Errorf("Update: %v, want %v", err, want)
		}
		return nil
	}
}

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
			return fmt.Errorf("Update: %v, want %v", err, want)
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
