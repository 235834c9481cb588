// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func testMem(t testing.TB, n int) *Mem {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return NewMem(b, Lines, Best(), nil)
}

func TestPagesSync(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "m")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	m := NewMem(b, Pages, None, nil)
	if err := m.Fence(); err != nil || m.Syncs() != 0 {
		t.Fatalf("a fence without a flush called msync %d times: %v", m.Syncs(), err)
	}
	m.Store64(5000*8, 7)
	m.Flush(5000*8, 8)
	m.Flush(9*4096, 1)
	if err := m.Fence(); err != nil || m.Syncs() != 1 {
		t.Fatalf("%d calls of msync, want 1: %v", m.Syncs(), err)
	}
	// A page that cannot be written back fails, and goes on failing.
	unix.Munmap(b)
	m.Flush(0, 8)
	for range 2 {
		if err := m.Fence(); !errors.Is(err, unix.ENOMEM) {
			t.Fatalf("msync of unmapped memory: %v", err)
		}
	}
}

type dropAll struct{ events int }

func (d *dropAll) Store(uint64)           { d.events++ }
func (d *dropAll) Copy(_, _ uint64)       { d.events++ }
func (d *dropAll) NT(_, _ uint64)         { d.events++ }
func (d *dropAll) Flush(_, _ uint64) bool { d.events++; return false }
func (d *dropAll) Fence() bool            { d.events++; return false }
func (d *dropAll) Verify(bool) bool       { d.events++; return true }

func TestHookSeesAll(t *testing.T) {
	d := &dropAll{}
	m := NewMem(make([]byte, 1<<16), Pages, None, d)
	m.Store64(0, 1)
	m.Or64(0, 6)
	m.AndNot64(0, 2)
	if m.Load64(0) != 5 {
		t.Fatalf("word is %d", m.Load64(0))
	}
	m.Copy(64, make([]byte, 10))
	m.Zero(64, 10)
	if err := m.Persist(0, 100); err != nil { // msync of heap memory would fail
		t.Fatal(err)
	}
	if !m.Verify(false) {
		t.Fatal("the hook was not asked")
	}
	if d.events != 8 {
		t.Fatalf("%d events, want 8", d.events)
	}
}
