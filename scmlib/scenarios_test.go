// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/scmlib"
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
			return fmt.Errorf("Update: %w, want %w", err, want)
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
	return slices.Concat(maintenance(), []*scenario{
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
		{name: "free on full", size: 96 << 10, opts: scmlib.Options{Lanes: 2, LaneSize: 512, ChunkSize: 16 << 10}, observe: seeBlocks, setup: full(64),
			ops: []func(*world) error{ // more than the tail of a lane holds: in a chunk that is kept back
				func(w *world) error {
					if err := w.r.Update(freeEvery(w.r, 3, errNo)); !errors.Is(err, errNo) {
						return err
					}
					return nil
				},
				func(w *world) error { return w.r.Update(freeEvery(w.r, 2, nil)) },
			}},
		{name: "two lanes", size: 64 << 10, opts: small, setup: makeRoot[cells], observe: seeCells,
			ops: []func(*world) error{overlap(nil), overlap(errNo)}},
	}, structures())
}

// seeBlocks tells which blocks there are.
func seeBlocks(r *scmlib.Region) (string, error) {
	n, sum := 0, uint64(0)
	r.Blocks(func(b scmlib.Block) bool { n++; sum = sum*31 + uint64(b.Off); return true })
	return fmt.Sprint(n, " blocks, ", sum), nil
}

// full allocates blocks of n bytes until the region is full.
func full(n uint64) func(*scmlib.Region) error {
	return func(r *scmlib.Region) error {
		return r.Update(func(tx *scmlib.Tx) error {
			for {
				if _, err := tx.Alloc(n); errors.Is(err, scmlib.ErrFull) {
					return nil
				} else if err != nil {
					return err
				}
			}
		})
	}
}

// freeEvery frees every nth block, and returns err.
func freeEvery(r *scmlib.Region, nth int, err error) func(*scmlib.Tx) error {
	return func(tx *scmlib.Tx) error {
		var offs []scmlib.Off
		i := 0
		r.Blocks(func(b scmlib.Block) bool {
			if i++; i%nth == 0 {
				offs = append(offs, b.Off)
			}
			return true
		})
		for _, off := range offs {
			if err := tx.Free(off); err != nil {
				return err
			}
		}
		return err
	}
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
			return fmt.Errorf("Update: %w, want %w", err, want)
		}
		return nil
	}
}
