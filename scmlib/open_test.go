// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib"
)

const mib = 1 << 20

func create(t testing.TB, path string, o scmlib.Options) *scmlib.Region {
	t.Helper()
	o.Create = true
	if o.Size == 0 {
		o.Size = mib
	}
	r, err := scmlib.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestOpenAgain(t *testing.T) {
	path := filepath.Join(scratch(t), "r")
	r := create(t, path, scmlib.Options{Layout: "test"})
	p, err := scmlib.Root[[3]uint64](r)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { return scmlib.Set(tx, &p.In(r)[1], 42) }); err != nil {
		t.Fatal(err)
	}
	was := r.Info()
	if _, err := scmlib.Open(path, scmlib.Options{}); !errors.Is(err, scmlib.ErrLocked) || !errdefs.IsUnavailable(err) {
		t.Fatalf("second writer: %v", err)
	}
	if _, err := scmlib.Open(path, scmlib.Options{ReadOnly: true}); !errors.Is(err, scmlib.ErrLocked) {
		t.Fatalf("reader beside a writer: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	for name, err := range map[string]error{
		"Update":  r.Update(func(*scmlib.Tx) error { return nil }),
		"Persist": r.Persist(p.Off(), 8), "View": r.View(func() error { return nil }), "Drain": r.Drain(),
	} {
		if !errors.Is(err, scmlib.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
	before, _ := os.ReadFile(path)
	ro, err := scmlib.Open(path, scmlib.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	p, err = scmlib.Root[[3]uint64](ro)
	if err != nil || p.In(ro)[1] != 42 {
		t.Fatalf("read-only: %v", err)
	}
	if err := ro.Update(func(*scmlib.Tx) error { return nil }); !errors.Is(err, scmlib.ErrReadOnly) {
		t.Fatalf("update: %v", err)
	}
	if err := errors.Join(ro.Close()); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Fatal("a read-only open changed the file")
	}
	r = create(t, path, scmlib.Options{Layout: "test"})
	i := r.Info()
	if i.UUID != was.UUID || i.Generation != was.Generation+1 || i.Recovered != 0 || i.Healed || i.Size != mib || i.Layout != "test" {
		t.Fatalf("second open: %+v, first: %+v", i, was)
	}
	if _, err := scmlib.Root[[4]uint64](r); !errors.Is(err, scmlib.ErrType) {
		t.Fatalf("root of another type: %v", err)
	}

	if _, err := scmlib.Root[[3]int64](r); !errors.Is(err, scmlib.ErrType) {
		t.Fatalf("root of another kind: %v", err)
	}
}

// Each damage must be refused with its own error, and leave the file as it is.
func TestRefused(t *testing.T) {
	dir := scratch(t)
	path := filepath.Join(dir, "good")
	r := create(t, path, scmlib.Options{Layout: "test"})
	if _, err := scmlib.Root[[3]uint64](r); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	forge := func(at int, b byte) func([]byte) []byte {
		return func(img []byte) []byte { scmlib.ForgeHeader(img, at, b); return img }
	}
	zero := func(from, to int) func([]byte) []byte {
		return func(img []byte) []byte { clear(img[from:to]); return img }
	}
	for _, c := range []struct {
		name string
		o    scmlib.Options
		bad  func([]byte) []byte
		want error
		says string
	}{
		{"layout", scmlib.Options{Layout: "other"}, nil, scmlib.ErrLayout, "it is \"test\", not \"other\""},
		{"long layout", scmlib.Options{Layout: strings.Repeat("x", 65)}, nil, scmlib.ErrLayout, "64"},
		{"size asked", scmlib.Options{Size: 2 * mib}, nil, scmlib.ErrSize, "has 1048576 bytes, not 2097152"},
		{"cut", scmlib.Options{}, func(b []byte) []byte { return b[:mib/2] }, scmlib.ErrSize, "its file 524288"},
		{"extended", scmlib.Options{}, func(b []byte) []byte { return append(b, make([]byte, 4096)...) }, scmlib.ErrSize, "its file 1052672"},
		{"cut short of anything", scmlib.Options{}, func(b []byte) []byte { return b[:4096] }, scmlib.ErrSize, "the file has 4096 bytes"},
		{"empty", scmlib.Options{}, func([]byte) []byte { return nil }, scmlib.ErrUnformatted, "empty"},
		{"zeros", scmlib.Options{}, zero(0, mib), scmlib.ErrUnformatted, "Create"},
		{"zeroed headers", scmlib.Options{Create: true}, zero(0, 8192), scmlib.ErrCorrupt, "no region header"},
		{"version", scmlib.Options{}, forge(12, 2), scmlib.ErrVersion, "version 2, this library knows 1"},
		{"feature", scmlib.Options{}, forge(16, 0x82), scmlib.ErrVersion, "unknown features 0x82"},
		{"big endian", scmlib.Options{}, func(b []byte) []byte {
			for _, c := range []int{0, 4096} {
				copy(b[c+8:], []byte{1, 2, 3, 4})
			}
			return b
		}, scmlib.ErrVersion, "big-endian"},
		{"both headers", scmlib.Options{Create: true}, func(b []byte) []byte { b[200]++; b[4096+300]++; return b }, scmlib.ErrCorrupt, "checksum"},
		{"other file", scmlib.Options{Create: true}, func(b []byte) []byte { return bytes.Repeat([]byte("text"), mib/4) }, scmlib.ErrCorrupt, "no region header"},
		{"lanes", scmlib.Options{}, forge(139, 0x7f), scmlib.ErrCorrupt, "lanes"},
		{"chunk size", scmlib.Options{}, forge(160, 3), scmlib.ErrCorrupt, "chunks"},
		{"chunk count", scmlib.Options{}, forge(166, 0x70), scmlib.ErrCorrupt, "heap"},
		{"heap", scmlib.Options{}, forge(159, 0xff), scmlib.ErrCorrupt, "heap"},
		{"state", scmlib.Options{}, forge(192, 9), scmlib.ErrCorrupt, "state 9"},
		{"table", scmlib.Options{}, func(b []byte) []byte { b[le64(b[144:])] = 7; return b }, scmlib.ErrCorrupt, "chunk table, word 0"},
		{"unsafe shutdown", scmlib.Options{}, func(b []byte) []byte {
			scmlib.ForgeHeader(b, 192, 2)
			scmlib.ForgeHeader(b, 200, 5)
			scmlib.ForgeHeader(b, 208, 4)
			return b
		}, scmlib.ErrUnsafe, "was 4 when the region was in use, and is 5 now"},
		{"not durable", scmlib.Options{Require: scmlib.Guarantee{Durability: scmlib.PowerLoss}}, nil, scmlib.ErrDurability, "tmpfs"},
		{"too coarse", scmlib.Options{Require: scmlib.Guarantee{Granularity: scmlib.Byte}}, nil, scmlib.ErrGranularity, "tmpfs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-"))
			img := bytes.Clone(good)
			if c.bad != nil {
				img = c.bad(img)
			}
			if err := os.WriteFile(p, img, 0o600); err != nil {
				t.Fatal(err)
			}
			if onMemory(t, dir) == false && (errors.Is(c.want, scmlib.ErrDurability) || errors.Is(c.want, scmlib.ErrGranularity)) {
				t.Skip("not on a memory filesystem")
			}
			r, err := scmlib.Open(p, c.o)
			if err == nil {
				r.Close()
			}
			if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.says) || !strings.Contains(fmt.Sprint(err), p) || strings.Contains(fmt.Sprint(err), "\n") {
				t.Fatalf("error %v; want one line of class %v that says %q and names the file", err, c.want, c.says)
			}
			if got, _ := os.ReadFile(p); !bytes.Equal(got, img) {
				t.Fatal("a refused region was changed")
			}
		})
	}
}

func le64(b []byte) uint64 {
	var v uint64
	for i := range 8 {
		v |= uint64(b[i]) << (8 * i)
	}
	return v
}

func onMemory(t *testing.T, dir string) bool {
	t.Helper()
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		t.Fatal(err)
	}
	return s.Type == unix.TMPFS_MAGIC
}

func TestUnsafeAccepted(t *testing.T) {
	img, _ := flipImage()
	scmlib.ForgeHeader(img, 192, 2)
	scmlib.ForgeHeader(img, 200, 5)
	scmlib.ForgeHeader(img, 208, 4)
	if _, err := scmlib.OpenImage(bytes.Clone(img), scmlib.Options{}); !errors.Is(err, scmlib.ErrUnsafe) {
		t.Fatal(err)
	}
	r, err := scmlib.OpenImage(img, scmlib.Options{AcceptUnsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if r, err = scmlib.OpenImage(img, scmlib.Options{}); err != nil { // the count has been seen
		t.Fatal(err)
	}
	r.Close()
}

func TestCreateErrors(t *testing.T) {
	dir := scratch(t)
	for name, o := range map[string]scmlib.Options{
		"no size":     {Create: true},
		"small":       {Create: true, Size: 4096},
		"odd":         {Create: true, Size: mib + 1},
		"huge":        {Create: true, Size: 1 << 60},
		"negative":    {Create: true, Size: -4096},
		"no room":     {Create: true, Size: 64 << 10, Lanes: 64, LaneSize: 8192},
		"odd chunk":   {Create: true, Size: mib, ChunkSize: 20000},
		"small lane":  {Create: true, Size: mib, LaneSize: 64},
		"beyond free": {Create: true, Size: 1 << 45},
	} {
		p := filepath.Join(dir, "x")
		if r, err := scmlib.Open(p, o); err == nil {
			r.Close()
			t.Errorf("%s: opened", name)
		}
		if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file was left behind", name)
			os.Remove(p)
		}
	}
	// An empty file is as empty as it was.
	p := filepath.Join(dir, "empty")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := scmlib.Open(p, scmlib.Options{Create: true, Size: mib, Mode: scmlib.Volume, Require: scmlib.Guarantee{Granularity: scmlib.Byte}}); !errors.Is(err, scmlib.ErrGranularity) {
		t.Errorf("empty file: %v", err)
	}
	if st, err := os.Stat(p); err != nil || st.Size() != 0 {
		t.Errorf("an empty file was grown: %v", err)
	}
	if _, err := scmlib.Open(filepath.Join(dir, "none"), scmlib.Options{}); !errors.Is(err, scmlib.ErrNoRegion) || !errdefs.IsNotFound(err) {
		t.Errorf("no file: %v", err)
	}
	if _, err := scmlib.Open(dir, scmlib.Options{ReadOnly: true}); !errors.Is(err, scmlib.ErrNoRegion) {
		t.Errorf("directory: %v", err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := scmlib.Open(filepath.Join(dir, "fifo"), scmlib.Options{}); !errors.Is(err, scmlib.ErrNoRegion) {
		t.Errorf("fifo: %v", err)
	}
}

// A preallocated file of zeros, as a daemon provides it, is formatted in place.
func TestFormatsZeros(t *testing.T) {
	p := filepath.Join(scratch(t), "r")
	if err := os.WriteFile(p, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := scmlib.Open(p, scmlib.Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if i := r.Info(); i.Size != mib || i.Generation != 1 || i.Healed {
		t.Fatalf("%+v", i)
	}
}

// A child that another goroutine is just making has the open file for a moment, and must not hold the region with it.
func TestCloseEndsTheLockOfAChild(t *testing.T) {
	path := filepath.Join(scratch(t), "r")
	r := create(t, path, scmlib.Options{Size: mib})
	var child int // what it has
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && to == path {
			n, err := strconv.Atoi(e.Name())
			if err == nil {
				child, err = unix.Dup(n)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if child == 0 {
		t.Fatal("no descriptor of the region")
	}
	defer unix.Close(child)
	if _, err := scmlib.Open(path, scmlib.Options{}); !errors.Is(err, scmlib.ErrLocked) {
		t.Fatalf("opened twice: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err = scmlib.Open(path, scmlib.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}
