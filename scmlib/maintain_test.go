// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

func makeCounter(t *testing.T, size int64, n uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "region")
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: size, Layout: "counter"})
	if err != nil {
		t.Fatal(err)
	}
	root, err := scmlib.Root[uint64](r)
	if err != nil {
		t.Fatal(err)
	}
	p := root.In(r)
	if err := r.Update(func(tx *scmlib.Tx) error { err := tx.Add(p); *p = n; return err }); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func counter(t *testing.T, path string) (uint64, scmlib.Info, uint64) {
	t.Helper()
	r, err := scmlib.Open(path, scmlib.Options{Layout: "counter"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	root, err := scmlib.Root[uint64](r)
	if err != nil {
		t.Fatal(err)
	}
	return *root.In(r), r.Info(), r.Free()
}

func TestAdopt(t *testing.T) {
	path := makeCounter(t, 1<<20, 42)
	_, before, _ := counter(t, path)
	if err := scmlib.Adopt(path); err != nil {
		t.Fatal(err)
	}
	n, after, _ := counter(t, path)
	if n != 42 || after.Parent != before.UUID || after.UUID == before.UUID {
		t.Fatalf("%d, %s with parent %s; it was %s", n, after.UUID, after.Parent, before.UUID)
	}
	blank := filepath.Join(t.TempDir(), "blank")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := scmlib.Adopt(blank); !errors.Is(err, scmlib.ErrUnformatted) {
		t.Fatal(err)
	}
}

func TestGrow(t *testing.T) {
	path := makeCounter(t, 1<<20, 7)
	_, before, free := counter(t, path)
	extend := func(f *os.File) error { return f.Truncate(4 << 20) }
	if err := scmlib.Grow(path, 4<<20, extend); err != nil {
		t.Fatal(err)
	}
	n, after, more := counter(t, path)
	if n != 7 || after.Size != 4<<20 || after.UUID != before.UUID || more != free+3<<20 {
		t.Fatalf("%d, size %d, free %d then %d", n, after.Size, free, more)
	}
	// The new memory is usable.
	r, err := scmlib.Open(path, scmlib.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { _, err := tx.Alloc(3 << 20); return err }); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1 << 20, 4 << 20, 4<<20 + 1, 1 << 40} {
		if err := scmlib.Grow(path, size, func(*os.File) error { t.Fatal("extended"); return nil }); !errors.Is(err, scmlib.ErrSize) {
			t.Fatalf("to %d: %v", size, err)
		}
	}
	// Cut short before the header: the file at its old size is the old region.
	full := errors.New("no space")
	if err := scmlib.Grow(path, 8<<20, func(f *os.File) error { return errors.Join(f.Truncate(8<<20), full) }); !errors.Is(err, full) {
		t.Fatal(err)
	}
	if _, err := scmlib.Open(path, scmlib.Options{}); !errors.Is(err, scmlib.ErrSize) {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 4<<20); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := counter(t, path); n != 7 {
		t.Fatal(n)
	}
}

// A region that was in use when its memory lost data is refused; one that was closed is not.
func TestStamp(t *testing.T) {
	path := makeCounter(t, 1<<20, 7)
	stamp := func(count uint64) {
		t.Helper()
		if err := scmlib.Stamp(path, count, [16]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	stamp(3)
	if n, _, _ := counter(t, path); n != 7 {
		t.Fatal(n)
	}
	stamp(4) // it was closed
	r, err := scmlib.Open(path, scmlib.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := scmlib.Stamp(path, 5, [16]byte{1}); !errors.Is(err, scmlib.ErrLocked) {
		t.Fatal(err)
	}
	crashed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, crashed, 0o600); err != nil {
		t.Fatal(err)
	}
	stamp(4)
	if n, _, _ := counter(t, path); n != 7 { // crashed, but nothing was lost
		t.Fatal(n)
	}
	if err := os.WriteFile(path, crashed, 0o600); err != nil {
		t.Fatal(err)
	}
	stamp(5)
	if _, err := scmlib.Open(path, scmlib.Options{}); !errors.Is(err, scmlib.ErrUnsafe) {
		t.Fatal(err)
	}
	// On another device the count says nothing.
	if err := os.WriteFile(path, crashed, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := scmlib.Stamp(path, 9, [16]byte{2}); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := counter(t, path); n != 7 {
		t.Fatal(n)
	}
	blank := filepath.Join(t.TempDir(), "blank")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := scmlib.Stamp(blank, 1, [16]byte{1}); !errors.Is(err, scmlib.ErrCorrupt) {
		t.Fatal(err)
	}
}
