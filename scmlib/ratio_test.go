// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
)

// TestMeasure states the best of many short rounds of Region.Persist and of transactions: what is left when the machine is quiet for a moment.
// SCM_MEASURE=1 go test -run Measure -v
func TestMeasure(t *testing.T) {
	if os.Getenv("SCM_MEASURE") == "" {
		t.Skip("SCM_MEASURE is not set")
	}
	r := create(t, filepath.Join(scratch(t), "r"), scmlib.Options{Size: 256 << 20})
	const n, rounds = 20_000_000, 2000
	var p scmlib.Ptr[int32]
	if err := r.Update(func(tx *scmlib.Tx) (err error) { p, err = scmlib.NewSlice[int32](tx, n); return err }); err != nil {
		t.Fatal(err)
	}
	a := p.Slice(r, n)
	rnd := rand.New(rand.NewPCG(1, 2))
	best := func(name string, op func() error) {
		d := time.Hour
		for range 300 {
			t0 := time.Now()
			for range rounds {
				if err := op(); err != nil {
					t.Fatal(err)
				}
			}
			d = min(d, time.Since(t0))
		}
		t.Logf("%-28s %8.1f ns", name, float64(d.Nanoseconds())/rounds)
	}
	at := 0
	best("Region.Persist, next line", func() error {
		a[at]++
		err := r.Persist(p.Off()+scmlib.Off(4*at), 4)
		if at += 16; at >= 4<<20 {
			at = 0
		}
		return err
	})
	best("random ++", func() error { a[rnd.Uint64N(n)]++; return nil })
	best("random ++ and Persist", func() error {
		i := rnd.Uint64N(n)
		a[i]++
		return r.Persist(p.Off()+scmlib.Off(4*i), 4)
	})
	best("empty Update", func() error { return r.Update(func(*scmlib.Tx) error { return nil }) })
	tx10 := func(span uint64) func() error {
		var idx [10]*int32
		return func() error {
			for i := range idx {
				idx[i] = &a[rnd.Uint64N(span)]
			}
			return r.Update(func(tx *scmlib.Tx) error {
				if err := scmlib.AddAll(tx, idx[:]...); err != nil {
					return err
				}
				for _, p := range idx {
					*p++
				}
				return nil
			})
		}
	}
	best("10 updates, of 80 MB", tx10(n))
	best("10 updates, of 4 KB", tx10(1000))
	best("1 update", func() error {
		return r.Update(func(tx *scmlib.Tx) error {
			i := rnd.Uint64N(1000)
			return scmlib.Set(tx, &a[i], 1)
		})
	})
}
