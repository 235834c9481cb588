// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

// fillWith allocates blocks of n bytes until the region is full, a few in each transaction.
func fillWith(t *testing.T, r *scmlib.Region, n uint64) (all []scmlib.Off) {
	t.Helper()
	for full := false; !full; {
		err := r.Update(func(tx *scmlib.Tx) error {
			for range 8 {
				off, err := tx.Alloc(n)
				if errors.Is(err, scmlib.ErrFull) {
					full = true
					return nil
				}
				if err != nil {
					return err
				}
				all = append(all, off)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func blockCount(r *scmlib.Region) (n int) {
	r.Blocks(func(scmlib.Block) bool { n++; return true })
	return n
}

func freeAll(offs []scmlib.Off) func(*scmlib.Tx) error {
	return func(tx *scmlib.Tx) error {
		for _, off := range offs {
			if err := tx.Free(off); err != nil {
				return err
			}
		}
		return nil
	}
}

// fullCases are regions of all proportions, and sizes of blocks from the smallest to those of several chunks.
func fullCases(t *testing.T, fn func(t *testing.T, open func() *scmlib.Region, n uint64)) {
	for _, size := range []int{64 << 10, 160 << 10, 256 << 10, mib, mib + 4096, 5 * mib, 17 * mib} {
		for _, o := range []scmlib.Options{{}, {Lanes: 2, LaneSize: 512}, {Lanes: 1, LaneSize: 1024, ChunkSize: 16 << 10}} {
			for _, n := range []uint64{32, 64, 1000, 7000, 20 << 10} {
				if testing.Short() && size > mib || size > 5*mib && n < 64 {
					continue
				}
				t.Run(fmt.Sprintf("%dk lane %d blocks %d", size>>10, o.LaneSize, n), func(t *testing.T) {
					fn(t, func() *scmlib.Region { return image(t, size, o) }, n)
				})
			}
		}
	}
}

// To make room needs no room: all that a full region holds is freed by one transaction.
func TestFreeOnFullRegion(t *testing.T) {
	fullCases(t, func(t *testing.T, open func() *scmlib.Region, n uint64) {
		r := open()
		start := r.Free()
		offs := fillWith(t, r, n)
		rand.Shuffle(len(offs), func(i, j int) { offs[i], offs[j] = offs[j], offs[i] })
		// What is not freed is still there, and what is taken back was not freed.
		rest := len(offs) / 10
		if err := r.Update(func(tx *scmlib.Tx) error { return errors.Join(freeAll(offs[rest:])(tx), errNo) }); !errors.Is(err, errNo) {
			t.Fatal(err)
		}
		if got := blockCount(r); got != len(offs) {
			t.Fatalf("%d blocks after a rollback, want %d", got, len(offs))
		}
		if err := r.Update(freeAll(offs[rest:])); err != nil {
			t.Fatalf("free %d of %d blocks: %v", len(offs)-rest, len(offs), err)
		}
		if got := blockCount(r); got != rest {
			t.Fatalf("%d blocks, want %d", got, rest)
		}
		again := fillWith(t, r, n)
		if len(again)+rest != len(offs) {
			t.Errorf("%d blocks fit again, %d were freed", len(again), len(offs)-rest)
		}
		if err := r.Update(freeAll(append(again, offs[:rest]...))); err != nil {
			t.Fatal(err)
		}
		var large scmlib.Off
		if err := r.Update(func(tx *scmlib.Tx) (err error) { large, err = tx.Alloc(start); return err }); err != nil {
			t.Errorf("the heap is not empty again: %v", err)
		} else if err := r.Update(freeAll([]scmlib.Off{large})); err != nil {
			t.Error(err)
		}
	})
}

// A transaction that was told that the region is full can commit what it has, whatever it frees besides.
func TestCommitAfterFull(t *testing.T) {
	fullCases(t, func(t *testing.T, open func() *scmlib.Region, n uint64) {
		r := open()
		offs := fillWith(t, r, n)
		if len(offs) < 2 {
			t.Skip("too few blocks")
		}
		var odd, even []scmlib.Off
		for i, off := range offs {
			if i%2 == 0 {
				even = append(even, off)
			} else {
				odd = append(odd, off)
			}
		}
		if err := r.Update(freeAll(even)); err != nil {
			t.Fatal(err)
		}
		// The words of all bitmaps are both set and cleared.
		got := 0
		if err := r.Update(func(tx *scmlib.Tx) error {
			if err := freeAll(odd)(tx); err != nil {
				return err
			}
			for {
				_, err := tx.Alloc(n)
				if errors.Is(err, scmlib.ErrFull) {
					return nil
				}
				if err != nil {
					return err
				}
				got++
			}
		}); err != nil {
			t.Fatalf("%d allocated, %d freed: %v", got, len(odd), err)
		}
		if now := blockCount(r); got == 0 || now != got {
			t.Errorf("%d blocks, %d were allocated", now, got)
		}
	})
}

// Transactions that free at the same time all succeed, also where each needs what is kept back.
func TestFreeOnFullRegionAtOnce(t *testing.T) {
	r := image(t, 2*mib, scmlib.Options{Lanes: 8, LaneSize: 512})
	for range 5 {
		offs := fillWith(t, r, 64)
		rand.Shuffle(len(offs), func(i, j int) { offs[i], offs[j] = offs[j], offs[i] })
		errs := make([]error, 8)
		var wg sync.WaitGroup
		for i := range errs {
			part := offs[len(offs)*i/8 : len(offs)*(i+1)/8]
			wg.Go(func() { errs[i] = r.Update(freeAll(part)) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		if n := blockCount(r); n != 0 {
			t.Fatalf("%d blocks are left", n)
		}
	}
}

// What Add logs has no bound: on a full region it fails, says what can be done, and leaves the transaction as it was.
func TestAddOnFullRegion(t *testing.T) {
	r := image(t, mib, scmlib.Options{})
	var large scmlib.Off
	if err := r.Update(func(tx *scmlib.Tx) (err error) { large, err = tx.Alloc(100 << 10); return err }); err != nil {
		t.Fatal(err)
	}
	offs := fillWith(t, r, 64)
	if err := r.Update(func(tx *scmlib.Tx) error {
		if err := freeAll(offs[:1000])(tx); err != nil {
			return err
		}
		for range 2 { // a range that could not be added is not taken for one that was
			err := tx.AddRanges(scmlib.Range{Off: large, Len: 100 << 10})
			if !errors.Is(err, scmlib.ErrFull) || !strings.Contains(err.Error(), "change or free less in one transaction") {
				return fmt.Errorf("add: %w", err)
			}
		}
		return freeAll(offs[1000:])(tx)
	}); err != nil {
		t.Fatal(err)
	}
	if n := blockCount(r); n != 1 {
		t.Errorf("%d blocks, want the large one", n)
	}
}
