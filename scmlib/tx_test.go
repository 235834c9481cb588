// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/internal/crash"
)

func image(t testing.TB, size int, o scmlib.Options) *scmlib.Region {
	t.Helper()
	o.Create = true
	r, err := scmlib.OpenImage(make([]byte, size), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// A transaction of ten updates has three fences.
func TestTenUpdatesThreeFences(t *testing.T) {
	img := make([]byte, 256<<10)
	o := small
	o.Create = true
	r, err := scmlib.OpenImage(img, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := scmlib.Root[cells](r); err != nil {
		t.Fatal(err)
	}
	r.Close()
	tr := crash.NewTracer(img, nil)
	if r, err = scmlib.OpenImage(img, scmlib.WithHook(small, tr)); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := root[cells](r)
	tr.Mark()
	if err := r.Update(func(tx *scmlib.Tx) error { return bump(tx, c, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9) }); err != nil {
		t.Fatal(err)
	}
	n := tr.Fences()
	t.Logf("tx10_fences=%d", n)
	if n != 3 {
		t.Errorf("%d fences, want 3", n)
	}
	tr.Mark()
	if err := r.Update(func(tx *scmlib.Tx) error { return alloc(r, c, tx, 0, 100, 1) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("allocation that makes a run: %d fences", tr.Fences())
	tr.Mark()
	if err := r.Update(func(tx *scmlib.Tx) error { return alloc(r, c, tx, 1, 100, 1) }); err != nil {
		t.Fatal(err)
	}
	if n := tr.Fences(); n != 3 {
		t.Errorf("allocation and link: %d fences, want 3", n)
	}
	tr.Mark()
	if err := r.Update(func(*scmlib.Tx) error { return nil }); err != nil || tr.Fences() != 0 {
		t.Errorf("an empty transaction has %d fences: %v", tr.Fences(), err)
	}
}

func TestPanicAndGoexit(t *testing.T) {
	r := image(t, mib, scmlib.Options{})
	c := root[cells](r)
	lanes := scmlib.FreeLanes(r)
	func() {
		defer func() {
			if recover() != "boom" {
				t.Error("the panic did not go on")
			}
		}()
		_ = r.Update(func(tx *scmlib.Tx) error { _ = bump(tx, c, 1, 0); panic("boom") })
	}()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.Update(func(tx *scmlib.Tx) error { _ = bump(tx, c, 1, 0); runtime.Goexit(); return nil })
	}()
	<-done
	var late *scmlib.Tx
	err := r.Update(func(tx *scmlib.Tx) error {
		late = tx
		bad, _ := scmlib.PtrAt[cells](4096)
		_ = bump(tx, c, 1, 0)
		bad.In(r).Flag = 1
		return nil
	})
	var pe *scmlib.PtrError
	if !errors.As(err, &pe) || !errors.Is(err, scmlib.ErrRange) || pe.Off != 4096 {
		t.Errorf("bad pointer: %v", err)
	}
	if c.A[0].V != 0 {
		t.Errorf("not rolled back: %d", c.A[0].V)
	}
	if n := scmlib.FreeLanes(r); n != lanes {
		t.Errorf("%d lanes are free, want %d", n, lanes)
	}
	for _, err := range []error{late.Add(c), late.Free(64), late.Dirty(64, 1), scmlib.AddAll(late, &c.Flag)} {
		if !errors.Is(err, scmlib.ErrTxDone) {
			t.Errorf("transaction that has ended: %v", err)
		}
	}
	if _, err := late.Alloc(1); !errors.Is(err, scmlib.ErrTxDone) {
		t.Error(err)
	}
}

func TestAddErrors(t *testing.T) {
	r := image(t, mib, scmlib.Options{})
	c := root[cells](r)
	var heap uint64
	for name, fn := range map[string]func(tx *scmlib.Tx) error{
		"Go memory": func(tx *scmlib.Tx) error { return tx.Add(&heap) },
		"header":    func(tx *scmlib.Tx) error { return tx.AddRanges(scmlib.Range{Off: 0, Len: 8}) },
		"lanes":     func(tx *scmlib.Tx) error { return tx.AddRanges(scmlib.Range{Off: 12288, Len: 8}) },
		"end":       func(tx *scmlib.Tx) error { return tx.AddRanges(scmlib.Range{Off: mib - 8, Len: 16}) },
		"overflow":  func(tx *scmlib.Tx) error { return tx.AddRanges(scmlib.Range{Off: ^scmlib.Off(0) - 8, Len: 16}) },
		"Dirty":     func(tx *scmlib.Tx) error { return tx.Dirty(mib, 1) },
	} {
		if err := r.Update(fn); !errors.Is(err, scmlib.ErrRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return tx.Add(c.Flag) }); !errors.Is(err, scmlib.ErrType) {
		t.Errorf("Add of a value: %v", err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return tx.Add(c.Wide[3:5], &c.Flag) }); err != nil {
		t.Errorf("Add of a slice: %v", err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { _, err := scmlib.New[*int](tx); return err }); !errors.Is(err, scmlib.ErrType) {
		t.Errorf("New of a pointer: %v", err)
	}
	if err := r.Persist(0, 8); !errors.Is(err, scmlib.ErrRange) {
		t.Errorf("Persist of the header: %v", err)
	}
	if err := r.CopyNT(mib-4, make([]byte, 8)); !errors.Is(err, scmlib.ErrRange) {
		t.Errorf("CopyNT beyond the end: %v", err)
	}
}

func TestFreeErrors(t *testing.T) {
	r := image(t, mib, scmlib.Options{})
	var a, large scmlib.Off
	if err := r.Update(func(tx *scmlib.Tx) (err error) {
		a, err = tx.Alloc(64)
		if err == nil {
			large, err = tx.Alloc(40 << 10)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for name, off := range map[string]scmlib.Off{"nil": 0, "header": 4096, "inside": a + 32, "bitmap": a &^ 16383, "not allocated": a + 64,
		"inside a large one": large + 64, "its second chunk": large + 16<<10, "beyond": mib} {
		if err := r.Update(func(tx *scmlib.Tx) error { return tx.Free(off) }); !errors.Is(err, scmlib.ErrFree) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return errors.Join(tx.Free(a), tx.Free(a)) }); !errors.Is(err, scmlib.ErrFree) {
		t.Errorf("twice: %v", err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return errors.Join(tx.Free(a), tx.Free(large)) }); err != nil {
		t.Errorf("once: %v", err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return tx.Free(a) }); !errors.Is(err, scmlib.ErrFree) {
		t.Errorf("again: %v", err)
	}
}

// A full region says so, loses nothing, and can be emptied and filled again as often as one likes.
func TestFull(t *testing.T) {
	r := image(t, 256<<10, scmlib.Options{Lanes: 2, LaneSize: 1024})
	start := r.Free()
	first := 0
	for round, n := range []uint64{100, 3000, 100, 20 << 10, 32, 6000} {
		var all []scmlib.Off
		for {
			var off scmlib.Off
			err := r.Update(func(tx *scmlib.Tx) (err error) { off, err = tx.Alloc(n); return err })
			if errors.Is(err, scmlib.ErrFull) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, off)
		}
		if round == 0 {
			first = len(all)
		}
		if n == 100 && len(all) != first || len(all) < int(start/n/2) {
			t.Errorf("round %d: %d blocks of %d bytes", round, len(all), n)
		}
		seen := map[scmlib.Off]bool{}
		for _, off := range all {
			if seen[off] {
				t.Fatalf("block %d was handed out twice", off)
			}
			seen[off] = true
		}
		for len(all) > 0 {
			k := min(len(all), 50)
			if err := r.Update(func(tx *scmlib.Tx) error {
				for _, off := range all[:k] {
					if err := tx.Free(off); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			all = all[k:]
		}
	}
	r.Blocks(func(b scmlib.Block) bool { t.Errorf("block %d is left", b.Off); return true })
}

// Blocks of all sizes are aligned, zeroed, big enough and do not overlap.
func TestSizes(t *testing.T) {
	r := image(t, 16*mib, scmlib.Options{})
	var ends = map[scmlib.Off]uint64{}
	for n := uint64(1); n < 300<<10; n += n/3 + 1 {
		var off scmlib.Off
		if err := r.Update(func(tx *scmlib.Tx) (err error) { off, err = tx.Alloc(n); return err }); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if off%32 != 0 || n > 32 && off%64 != 0 {
			t.Errorf("%d bytes at %d", n, off)
		}
		b, err := r.Bytes(off, n)
		if err != nil || !bytes.Equal(b, make([]byte, n)) {
			t.Fatalf("%d bytes: not zero, %v", n, err)
		}
		for i := range b {
			b[i] = 0xff
		}
		ends[off] = n
	}
	r.Blocks(func(b scmlib.Block) bool {
		n, ok := ends[b.Off]
		if !ok || b.Size < n || n > 200 && b.Size > n+n/3+256<<10 {
			t.Errorf("block %+v for %d bytes", b, n)
		}
		delete(ends, b.Off)
		return true
	})
	if len(ends) > 0 {
		t.Errorf("blocks are missing: %v", ends)
	}
}

// Many goroutines allocate, link, move and free at the same time, each in cells of its own, and some share one under a lock. The race detector does
// not see mapped memory: what is checked is that nothing is lost.
func TestConcurrent(t *testing.T) {
	path := filepath.Join(scratch(t), "r")
	r := create(t, path, scmlib.Options{Size: 4 * mib, Lanes: 3})
	type shared struct {
		Sum   uint64
		Slots [8][20]scmlib.Off
	}
	p, err := scmlib.Root[shared](r)
	if err != nil {
		t.Fatal(err)
	}
	s := p.In(r)
	var mu sync.Mutex
	var wg sync.WaitGroup
	const rounds = 400
	for g := range s.Slots {
		wg.Add(1)
		go func() {
			defer wg.Done()
			slots := &s.Slots[g]
			for i := range rounds {
				k := (i*7 + g) % len(slots)
				err := r.Update(func(tx *scmlib.Tx) error {
					if err := scmlib.AddAll(tx, &slots[k]); err != nil {
						return err
					}
					if slots[k] != 0 {
						if err := tx.Free(slots[k]); err != nil {
							return err
						}
						slots[k] = 0
					} else {
						off, err := tx.Alloc(uint64(40 + 30*k))
						if err != nil {
							return err
						}
						b, err := r.Bytes(off, 8)
						if err != nil {
							return err
						}
						b[0] = byte(g)
						slots[k] = off
					}
					if i%5 == 0 {
						return errNo
					}
					return nil
				})
				if err != nil && !errors.Is(err, errNo) {
					t.Error(err)
					return
				}
				mu.Lock()
				err = r.Update(func(tx *scmlib.Tx) error { return scmlib.Set(tx, &s.Sum, s.Sum+1) })
				mu.Unlock()
				if err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	if s.Sum != 8*rounds {
		t.Errorf("sum %d, want %d", s.Sum, 8*rounds)
	}
	want := map[scmlib.Off]bool{p.Off(): true}
	for g := range s.Slots {
		for _, off := range s.Slots[g] {
			if off != 0 {
				if b, _ := r.Bytes(off, 1); want[off] || b[0] != byte(g) {
					t.Errorf("block %d belongs to two", off)
				}
				want[off] = true
			}
		}
	}
	r.Blocks(func(b scmlib.Block) bool {
		if !want[b.Off] {
			t.Errorf("block %d is lost", b.Off)
		}
		delete(want, b.Off)
		return true
	})
	if len(want) != 0 {
		t.Errorf("%d blocks are not allocated", len(want))
	}
}

// A file that is cut under the mapping faults: the fault is an error, the process lives, and the region is refused from then on where that is so.
func TestMediaError(t *testing.T) {
	path := filepath.Join(scratch(t), "r")
	r := create(t, path, scmlib.Options{Size: 4 * mib})
	var off scmlib.Off
	if err := r.Update(func(tx *scmlib.Tx) (err error) { off, err = tx.Alloc(2 * mib); return err }); err != nil {
		t.Fatal(err)
	}
	b, err := r.Bytes(off, 2*mib)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, mib); err != nil {
		t.Fatal(err)
	}
	at := uint64(off) + 2*mib - 64
	var me *scmlib.MediaError
	if err := r.View(func() error { b[2*mib-64]++; return nil }); !errors.As(err, &me) || me.Off != at || !errors.Is(err, err) {
		t.Errorf("View: %v", err)
	}
	me = nil
	if err := r.Update(func(tx *scmlib.Tx) error { return tx.AddRanges(scmlib.Range{Off: scmlib.Off(at), Len: 8}) }); !errors.As(err, &me) || me.Off != at {
		t.Errorf("Add: %v", err)
	}
	me = nil
	// msync has nothing to write where there is no page, so at page granularity this cannot fail.
	if err := r.Persist(scmlib.Off(at), 64); !errors.As(err, &me) && r.Granularity() != scmlib.Page {
		t.Errorf("Persist: %v", err)
	}
	me = nil
	if err := r.CopyNT(scmlib.Off(at), make([]byte, 64)); !errors.As(err, &me) {
		t.Errorf("CopyNT: %v", err)
	}
	var lost [64]byte
	if err := r.Update(func(tx *scmlib.Tx) error { _ = copy(lost[:], b[2*mib-64:]); return nil }); !errors.As(err, &me) {
		t.Errorf("Update: %v", err)
	}
	func() { // a fault elsewhere is not the region's
		defer func() {
			if recover() == nil {
				t.Error("a nil dereference was swallowed")
			}
		}()
		_ = r.View(func() error { var p *int; *p = 1; return nil })
	}()
}

// Blocks go from one goroutine to the next at once: who frees one that another has just freed must not be taken for the other.
func TestFreedBlocksGoRound(t *testing.T) {
	r := create(t, filepath.Join(scratch(t), "r"), scmlib.Options{Size: 4 * mib})
	type cells struct{ Slots [8]scmlib.Off }
	p, err := scmlib.Root[cells](r)
	if err != nil {
		t.Fatal(err)
	}
	slots := &p.In(r).Slots
	var wg sync.WaitGroup
	for g := range slots {
		wg.Go(func() {
			for range 4000 {
				err := r.Update(func(tx *scmlib.Tx) error {
					if err := scmlib.AddAll(tx, &slots[g]); err != nil {
						return err
					}
					if slots[g] != 0 {
						off := slots[g]
						slots[g] = 0
						return tx.Free(off)
					}
					off, err := tx.Alloc(64)
					slots[g] = off
					return err
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
