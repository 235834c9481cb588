// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

// benchDir is where the regions of the benchmarks lie: SCM_BENCH_DIR, else memory.
func benchDir(b *testing.B) string { return scratch(b) }

func benchRegion(b *testing.B, size int64, mode scmlib.Mode) *scmlib.Region {
	b.Helper()
	path := filepath.Join(benchDir(b), "region")
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: size, Mode: mode})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := r.Close(); err != nil {
			b.Error(err)
		}
	})
	b.Logf("%s, durable against: %s (%s)", r.Info().Instruction, r.Durability(), r.Info().Why)
	return r
}

func benchSlice[T any](b *testing.B, r *scmlib.Region, n int) (scmlib.Ptr[T], []T) {
	b.Helper()
	var p scmlib.Ptr[T]
	if err := r.Update(func(tx *scmlib.Tx) (err error) { p, err = scmlib.NewSlice[T](tx, n); return err }); err != nil {
		b.Fatal(err)
	}
	return p, p.Slice(r, n)
}

// BenchmarkPersist is one store and one Persist, walking over lines; compare internal/persist BenchmarkBare.
func BenchmarkPersist(b *testing.B) {
	for _, n := range []uint64{64, 256, 4096, 65536} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := benchRegion(b, 64<<20, scmlib.Auto)
			const lines = 16 << 20 / 64
			p, s := benchSlice[[8]uint64](b, r, lines)
			step := n / 64
			at := uint64(0)
			b.SetBytes(int64(n))
			for b.Loop() {
				for k := range step {
					s[at+k][0]++
				}
				if err := r.Persist(p.Off()+scmlib.Off(64*at), n); err != nil {
					b.Fatal(err)
				}
				if at += step; at+step > lines {
					at = 0
				}
			}
		})
	}
}

// BenchmarkTx10 is the paper's figure 8: a transaction that updates ten elements of an array.
func BenchmarkTx10(b *testing.B) {
	run := func(mode scmlib.Mode, batched bool) func(b *testing.B) {
		return func(b *testing.B) {
			r := benchRegion(b, 128<<20, mode)
			const n = 20_000_000
			_, a := benchSlice[int32](b, r, n)
			rnd := rand.New(rand.NewPCG(1, 2))
			var idx [10]int
			for b.Loop() {
				for i := range idx {
					idx[i] = int(rnd.Uint64N(n))
				}
				err := r.Update(func(tx *scmlib.Tx) error {
					if batched {
						if err := scmlib.AddAll(tx, &a[idx[0]], &a[idx[1]], &a[idx[2]], &a[idx[3]], &a[idx[4]],
							&a[idx[5]], &a[idx[6]], &a[idx[7]], &a[idx[8]], &a[idx[9]]); err != nil {
							return err
						}
						for _, i := range idx {
							a[i]++
						}
						return nil
					}
					for _, i := range idx {
						if err := scmlib.AddAll(tx, &a[i]); err != nil {
							return err
						}
						a[i]++
					}
					return nil
				})
				if err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	b.Run("batched", run(scmlib.Auto, true))
	b.Run("one-by-one", run(scmlib.Auto, false))
	b.Run("msync", run(scmlib.Volume, true))
}

// BenchmarkTx10Bolt is what a user would take instead.
func BenchmarkTx10Bolt(b *testing.B) {
	db, err := bolt.Open(filepath.Join(benchDir(b), "bolt"), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	name := []byte("a")
	rnd := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		err := db.Update(func(tx *bolt.Tx) error {
			bk, err := tx.CreateBucketIfNotExists(name)
			if err != nil {
				return err
			}
			for range 10 {
				var k, v [8]byte
				k[0], k[1], k[2] = byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32N(4))
				if err := bk.Put(k[:], v[:]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRandomUpdate is the paper's figure 4: single updates of 20 million integers, without and with durability for each.
func BenchmarkRandomUpdate(b *testing.B) {
	for _, persist := range []bool{false, true} {
		b.Run(fmt.Sprintf("persist=%v", persist), func(b *testing.B) {
			r := benchRegion(b, 128<<20, scmlib.Auto)
			const n = 20_000_000
			p, a := benchSlice[int32](b, r, n)
			rnd := rand.New(rand.NewPCG(1, 2))
			for b.Loop() {
				i := rnd.Uint64N(n)
				a[i]++
				if persist {
					if err := r.Persist(p.Off()+scmlib.Off(4*i), 4); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkStream is STREAM's four kernels over arrays in a region (the paper's figure 5 is copy, 90 MB).
func BenchmarkStream(b *testing.B) {
	const n = 5_000_000
	r := benchRegion(b, 320<<20, scmlib.Auto)
	pa, x := benchSlice[float64](b, r, n)
	_, y := benchSlice[float64](b, r, n)
	_, z := benchSlice[float64](b, r, n)
	src, err := r.Bytes(pa.Off(), 8*n)
	if err != nil {
		b.Fatal(err)
	}
	pc, _ := benchSlice[float64](b, r, n)
	kernels := []struct {
		name  string
		bytes int64
		run   func()
	}{
		{"copy", 16 * n, func() { copy(y, x) }},
		{"copy-nt-durable", 16 * n, func() {
			if r.CopyNT(pc.Off(), src) != nil || r.Drain() != nil {
				b.Fatal("copy")
			}
		}},
		{"scale", 16 * n, func() {
			for i, v := range x {
				y[i] = 3 * v
			}
		}},
		{"add", 24 * n, func() {
			for i, v := range x {
				z[i] = v + y[i]
			}
		}},
		{"triad", 24 * n, func() {
			for i, v := range x {
				z[i] = v + 3*y[i]
			}
		}},
	}
	for _, k := range kernels {
		b.Run(k.name, func(b *testing.B) {
			b.SetBytes(k.bytes)
			for b.Loop() {
				k.run()
			}
		})
	}
}

// BenchmarkBTree is the paper's figures 6 and 9: inserts into a tree of 200 000 elements, each a transaction, and many in one.
func BenchmarkBTree(b *testing.B) {
	setup := func(b *testing.B, mode scmlib.Mode) (*scmlib.Region, *pmap.Tree[uint64], *rand.Rand) {
		r := benchRegion(b, 512<<20, mode)
		var h scmlib.Ptr[pmap.TreeHead]
		if err := r.Update(func(tx *scmlib.Tx) (err error) { h, err = scmlib.New[pmap.TreeHead](tx); return err }); err != nil {
			b.Fatal(err)
		}
		tree, err := pmap.NewTree[uint64](r, h)
		if err != nil {
			b.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			if err := r.Update(func(tx *scmlib.Tx) error {
				for range 1000 {
					if err := tree.Put(tx, rnd.Uint64(), 1); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				b.Fatal(err)
			}
		}
		return r, tree, rnd
	}
	insert := func(mode scmlib.Mode) func(b *testing.B) {
		return func(b *testing.B) {
			r, tree, rnd := setup(b, mode)
			for b.Loop() {
				if err := r.Update(func(tx *scmlib.Tx) error { return tree.Put(tx, rnd.Uint64(), 1) }); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	b.Run("insert-tx", insert(scmlib.Auto))
	b.Run("insert-tx-msync", insert(scmlib.Volume))
	b.Run("get", func(b *testing.B) {
		_, tree, rnd := setup(b, scmlib.Auto)
		for b.Loop() {
			tree.Get(rnd.Uint64())
		}
	})
	b.Run("bolt-insert-tx", func(b *testing.B) {
		db, err := bolt.Open(filepath.Join(benchDir(b), "bolt"), 0o600, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer db.Close()
		rnd := rand.New(rand.NewPCG(1, 2))
		put := func(n int) error {
			return db.Update(func(tx *bolt.Tx) error {
				bk, err := tx.CreateBucketIfNotExists([]byte("t"))
				for range n {
					var k, v [8]byte
					binary.BigEndian.PutUint64(k[:], rnd.Uint64())
					if err == nil {
						err = bk.Put(k[:], v[:])
					}
				}
				return err
			})
		}
		for range 20 {
			if err := put(10000); err != nil {
				b.Fatal(err)
			}
		}
		for b.Loop() {
			if err := put(1); err != nil {
				b.Fatal(err)
			}
		}
	})
}
