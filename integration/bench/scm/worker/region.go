// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"

	"github.com/nhybrid/nhybrid/integration/bench/scm/wire"
	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

// root is what is in the region.
type root struct {
	Array       scmlib.Ptr[int32]
	Plain, Each pmap.TreeHead
}

// region is a region of scmlib, wherever the environment says.
type region struct {
	r     *scmlib.Region
	z     sizes
	root  scmlib.Ptr[root]
	array scmlib.Ptr[int32]
}

// openRegion makes a region, and opens it again as it is. What it begins with is stored as in memory even where the region is a file: with msync
// for each of hundreds of thousands of inserts it would take minutes.
func openRegion(z sizes) (place, error) {
	p := &region{z: z}
	open := func() (err error) {
		if p.r, err = scmlib.FromEnv(scmlib.Options{Create: true}); err != nil {
			return err
		}
		p.root, err = scmlib.Root[root](p.r)
		return err
	}
	mode := os.Getenv("SCM_MODE")
	file := mode == scmlib.Volume.String() || mode == scmlib.Storage.String()
	const force = "SCM_FORCE_GRANULARITY"
	if file {
		if err := os.Setenv(force, "cacheline"); err != nil {
			return nil, err
		}
	}
	if err := open(); err != nil {
		return nil, err
	}
	if err := p.fill(); err != nil {
		return nil, err
	}
	if file {
		if err := errors.Join(p.r.Close(), os.Unsetenv(force)); err != nil {
			return nil, err
		}
		if err := open(); err != nil {
			return nil, err
		}
	}
	p.array = p.root.In(p.r).Array
	return p, nil
}

// fill stores what the region begins with.
func (p *region) fill() error {
	o := p.root.In(p.r)
	err := p.r.Update(func(tx *scmlib.Tx) error {
		a, err := scmlib.NewSlice[int32](tx, p.z.array)
		if err != nil {
			return err
		}
		return scmlib.Set(tx, &o.Array, a)
	})
	for _, head := range []*pmap.TreeHead{&o.Plain, &o.Each} {
		insert, terr := p.inserts(head, 1000, new(random(seed)))
		if err = errors.Join(err, terr); err == nil {
			err = insert(p.z.tree)
		}
	}
	return err
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
		"btree":       {make: func() (workload, error) { return p.inserts(&p.root.In(p.r).Plain, 1000, new(random(seed+1))) }},
		"btree-tx":    {make: func() (workload, error) { return p.inserts(&p.root.In(p.r).Each, 1, new(random(seed+1))) }},
	}
}

// update changes single integers, without making them durable: figure 4.
func (p *region) update() workload {
	a, rnd := p.array.Slice(p.r, p.z.array), random(seed)
	return func(n int) error {
		for range n {
			a[rnd.below(len(a))]++
		}
		return nil
	}
}

// updateSync makes each of them durable.
func (p *region) updateSync() workload {
	a, rnd := p.array.Slice(p.r, p.z.array), random(seed)
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
	a, rnd := p.array.Slice(p.r, p.z.array), random(seed)
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

// inserts puts random keys into a tree, so many in a transaction: figure 9 with one, figure 6 with many, where nothing is durable in between.
func (p *region) inserts(head *pmap.TreeHead, batch int, rnd *random) (workload, error) {
	off, err := scmlib.OffsetOf(p.r, head)
	if err != nil {
		return nil, err
	}
	at, err := scmlib.PtrAt[pmap.TreeHead](off)
	if err != nil {
		return nil, err
	}
	tree, err := pmap.NewTree[uint64](p.r, at)
	if err != nil {
		return nil, err
	}
	k := 0
	put := func(tx *scmlib.Tx) error {
		for range k {
			if err := tree.Put(tx, rnd.next(), 1); err != nil {
				return err
			}
		}
		return nil
	}
	return func(n int) error {
		for ; n > 0; n -= k {
			k = min(n, batch)
			if err := p.r.Update(put); err != nil {
				return err
			}
		}
		return nil
	}, nil
}
