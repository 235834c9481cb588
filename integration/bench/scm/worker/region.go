// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/nhybrid/nhybrid/integration/bench/scm/wire"
	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

// region is a region of scmlib, wherever the environment says.
type region struct {
	r     *scmlib.Region
	z     sizes
	array scmlib.Ptr[int32]
}

func openRegion(z sizes) (place, error) {
	r, err := scmlib.FromEnv(scmlib.Options{Create: true})
	if err != nil {
		return nil, err
	}
	p := &region{r: r, z: z}
	err = r.Update(func(tx *scmlib.Tx) (err error) { p.array, err = scmlib.NewSlice[int32](tx, z.array); return err })
	return p, err
}

func (p *region) close() error { return p.r.Close() }

func (p *region) hello() wire.Hello {
	i := p.r.Info()
	return wire.Hello{Granularity: i.Granularity.String(), Durability: i.Durability.String(), Why: i.Why, Mount: i.Mount, Instruction: i.Instruction}
}

func (p *region) workloads() map[string]*lazy {
	done := func(w workload) *lazy { return &lazy{run: w} }
	return map[string]*lazy{
		"update":      done(p.update()),
		"update-sync": done(p.updateSync()),
		"tx10":        done(p.tx10(true)),
		"tx10-single": done(p.tx10(false)),
		"persist":     done(p.persist()),
		"persist-asm": done(p.bare()),
		"btree":       {make: func() (workload, error) { return p.btree(1000) }},
		"btree-tx":    {make: func() (workload, error) { return p.btree(1) }},
	}
}

// update changes single integers, without making them durable: figure 4.
func (p *region) update() workload {
	a, rnd := p.array.Slice(p.r, p.z.array), random(88172645463325252)
	return func(n int) error {
		for range n {
			a[rnd.below(len(a))]++
		}
		return nil
	}
}

// updateSync makes each of them durable.
func (p *region) updateSync() workload {
	a, rnd := p.array.Slice(p.r, p.z.array), random(88172645463325252)
	return func(n int) error {
		for range n {
			i := rnd.below(len(a))
			a[i]++
			if err := p.r.Persist(p.array.Off()+scmlib.Off(4*i), 4); err != nil {
				return err
			}
		}
		return nil
	}
}

// tx10 updates ten integers in one transaction: figure 8. All ranges are named in one call, or each in one of its own before its change.
func (p *region) tx10(batched bool) workload {
	a, rnd := p.array.Slice(p.r, p.z.array), random(88172645463325252)
	var at [10]*int32
	all := func(tx *scmlib.Tx) error {
		if err := scmlib.AddAll(tx, at[:]...); err != nil {
			return err
		}
		for _, e := range at {
			*e++
		}
		return nil
	}
	each := func(tx *scmlib.Tx) error {
		for _, e := range at {
			if err := scmlib.AddAll(tx, e); err != nil {
				return err
			}
			*e++
		}
		return nil
	}
	do := all
	if !batched {
		do = each
	}
	return func(n int) error {
		for range n {
			for i := range at {
				at[i] = &a[rnd.below(len(a))]
			}
			if err := p.r.Update(do); err != nil {
				return err
			}
		}
		return nil
	}
}

// lines is what persist and bare walk over, in cache lines: 16 MiB, more than the second level of caches.
const lines = 16 << 20 / 64

// persist stores into one cache line after another and makes each durable.
func (p *region) persist() workload {
	a, at := p.array.Slice(p.r, p.z.array), 0
	span := min(len(a), 16*lines)
	return func(n int) error {
		for range n {
			a[at]++
			if err := p.r.Persist(p.array.Off()+scmlib.Off(4*at), 4); err != nil {
				return err
			}
			if at += 16; at >= span {
				at = 0
			}
		}
		return nil
	}
}

// bare is the same in assembly, with nothing but the instructions.
func (p *region) bare() workload {
	a, at := p.array.Slice(p.r, p.z.array), 0
	span := min(len(a), 16*lines) / 16
	return func(n int) error {
		for n > 0 {
			k := min(n, span-at, 1000) // the scheduler cannot interrupt assembly
			if err := p.barePersist(&a[16*at], k); err != nil {
				return err
			}
			n -= k
			if at += k; at == span {
				at = 0
			}
		}
		return nil
	}
}

// btree inserts into a tree: figure 9 with one insert a transaction; with many of them, where nothing is durable in between, figure 6.
func (p *region) btree(batch int) (workload, error) {
	var head scmlib.Ptr[pmap.TreeHead]
	if err := p.r.Update(func(tx *scmlib.Tx) (err error) { head, err = scmlib.New[pmap.TreeHead](tx); return err }); err != nil {
		return nil, err
	}
	tree, err := pmap.NewTree[uint64](p.r, head)
	if err != nil {
		return nil, err
	}
	rnd := random(88172645463325252)
	insert := func(n, batch int) error {
		k := 0
		put := func(tx *scmlib.Tx) error {
			for range k {
				if err := tree.Put(tx, rnd.next(), 1); err != nil {
					return err
				}
			}
			return nil
		}
		for ; n > 0; n -= k {
			k = min(n, batch)
			if err := p.r.Update(put); err != nil {
				return err
			}
		}
		return nil
	}
	return func(n int) error { return insert(n, batch) }, insert(p.z.tree, 1000)
}
