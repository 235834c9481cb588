// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/continuity/fs/fstest"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// TestAppliers: layers as an unpacker leaves them, written through real overlays.
func TestAppliers(t *testing.T) {
	requireRoot(t)
	s := newStack(t, func() bool { return true })
	for i, a := range []fstest.Applier{
		fstest.Apply(
			fstest.CreateDir("/etc", 0o755),
			fstest.CreateFile("/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644),
			fstest.CreateFile("/etc/shadow", []byte("root:*:\n"), 0o600),
			fstest.CreateDir("/usr/bin", 0o755),
			fstest.CreateFile("/usr/bin/su", []byte("#!/bin/sh\n"), 0o4755),
			fstest.Link("/usr/bin/su", "/usr/bin/su2"),
			fstest.Symlink("usr/bin", "/bin"),
			fstest.CreateDir("/tmp", 0o1777),
			fstest.CreateSocket("/usr/bin/socket", 0o600),
			fstest.CreateDeviceFile("/null", os.ModeDevice|os.ModeCharDevice|0o666, 1, 3),
			fstest.SetXAttr("/usr/bin/su", "user.made.by", "hand"),
			fstest.Lchtimes("/etc/hosts", epoch(1000000000), epoch(1000000000)),
		),
		fstest.Apply(
			fstest.Remove("/etc/shadow"),
			fstest.Chown("/etc/hosts", 10, 20),
			fstest.CreateFile("/etc/hosts", []byte("127.0.0.2 localhost\n"), 0o644),
			fstest.RemoveAll("/usr"),
			fstest.CreateDir("/usr", 0o700),
			fstest.CreateFile("/usr/x", nil, 0o644),
		),
		fstest.Apply(
			fstest.Rename("/usr/x", "/etc/y"),
			fstest.RemoveAll("/tmp"),
			fstest.CreateFile("/tmp", []byte("now a file"), 0o644),
			fstest.CreateDir("/etc/shadow", 0o755),
			fstest.CreateFile("/etc/shadow/file", []byte("x"), 0o644),
		),
	} {
		if i == 0 {
			base := t.TempDir()
			must(t, a.Apply(base))
			s.add(base)
			continue
		}
		upper, seen := s.container(func(root string) { must(t, a.Apply(root)) })
		s.add(upper)
		same(t, fmt.Sprint("layer ", i), seen, s.view())
	}
}

// TestLargeDirectory has 100 000 names in one directory, some of them in front of "." and "..".
func TestLargeDirectory(t *testing.T) {
	requireRoot(t)
	var names []string
	for i := range 100000 {
		names = append(names, fmt.Sprintf("%c-name-%d", "+-.a~"[i%5], i))
	}
	slices.Sort(names)
	s := new(synth).root().add(1, 0, "large", inode{mode: unix.S_IFDIR | 0o755})
	for i, name := range names {
		s.add(2, 0, name, inode{mode: unix.S_IFREG | 0o644, uid: uint32(i), sec: int64(i)})
	}
	dir := mountTree(t, writeTo(t, Chain{s.file(t, "1")}))
	entries, err := os.ReadDir(dir + "/large")
	must(t, err)
	if len(entries) != len(names) {
		t.Fatalf("%d entries, want %d", len(entries), len(names))
	}
	for i, e := range entries {
		var st unix.Stat_t
		must(t, unix.Lstat(dir+"/large/"+names[i], &st))
		if e.Name() != names[i] || st.Uid != uint32(i) {
			t.Fatalf("entry %d is %q of %d, want %q", i, e.Name(), st.Uid, names[i])
		}
	}
	if exists(dir + "/large/none") {
		t.Error("a name that is not there is found")
	}
}

// TestManyFiles: a layer of 20 000 files on disk.
func TestManyFiles(t *testing.T) {
	requireRoot(t)
	mem := tmpfs(t)
	dir := filepath.Join(mem, "layer")
	for i := range 20000 {
		if i%40 == 0 {
			must(t, os.MkdirAll(filepath.Join(dir, fmt.Sprintf("a%d/b%d", i/4000, i/40)), 0o755))
		}
		name := filepath.Join(dir, fmt.Sprintf("a%d/b%d/file-%d", i/4000, i/40, i))
		must(t, os.WriteFile(name, []byte{byte(i)}, os.FileMode(i%0o1000)))
	}
	i := 0
	s := newStack(t, func() bool { i++; return i%2 == 0 })
	s.roots = roots{filepath.Join(mem, "nvm"), filepath.Join(mem, "hdd")}
	must(t, os.Mkdir(s.roots.nvm, 0o755))
	must(t, os.Mkdir(s.roots.hdd, 0o755))
	s.add(dir)
	same(t, "20000 files", list(t, dir), s.view())
}

// TestDirectorySizes: each number of names and length of names around the end of a block.
func TestDirectorySizes(t *testing.T) {
	requireRoot(t)
	s := new(synth).root()
	want := map[string]int{}
	for i := range 300 {
		dir := fmt.Sprintf("d%03d", i)
		s.add(1, 0, dir, inode{mode: unix.S_IFDIR | 0o755})
		n := i + 1
		if i >= 150 {
			n = 14 + i%20 // names of 255 bytes: 15 to a block
		}
		want[dir] = n
		for j := range n {
			name := fmt.Sprintf("%03d-%s", j, strings.Repeat("x", i%50))
			if i >= 150 {
				name = fmt.Sprintf("%03d%s", j, strings.Repeat("y", 252-i%3))
			}
			s.add(2, 0, name, inode{mode: unix.S_IFIFO | 0o600})
		}
	}
	root := mountTree(t, writeTo(t, Chain{s.file(t, "1")}))
	for dir, n := range want {
		entries, err := os.ReadDir(filepath.Join(root, dir))
		must(t, err)
		if len(entries) != n {
			t.Errorf("%s has %d entries, want %d", dir, len(entries), n)
		}
		for _, e := range entries {
			if _, err := os.Lstat(filepath.Join(root, dir, e.Name())); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestExtremes: values at the ends of their ranges, through kernel, fsck.erofs and go-erofs.
func TestExtremes(t *testing.T) {
	requireRoot(t)
	reg := func(f func(*inode)) inode { i := inode{mode: unix.S_IFREG | 0o644}; f(&i); return i }
	files := map[string]inode{
		"8TiB":       reg(func(i *inode) { i.size = 8 << 40 }),
		"8TiB+1":     reg(func(i *inode) { i.size = 8<<40 + 1 }),
		"largest":    reg(func(i *inode) { i.size = 1<<63 - 1 }),
		"byte":       reg(func(i *inode) { i.size = 1 }),
		"owner":      reg(func(i *inode) { i.uid, i.gid = 1<<32-2, 1<<32-3 }),
		"past":       reg(func(i *inode) { i.sec, i.nsec = -1<<40, 999999999 }),
		"future":     reg(func(i *inode) { i.sec, i.nsec = 1<<40, 1 }),
		"sticky":     {mode: unix.S_IFREG | 0o7777},
		"device":     {mode: unix.S_IFBLK | 0o600, rdev: unix.Mkdev(4095, 1<<20-1)},
		"null":       {mode: unix.S_IFCHR | 0o600, rdev: unix.Mkdev(1, 3)},
		"block 0:0":  {mode: unix.S_IFBLK | 0o600},
		"long":       {mode: unix.S_IFLNK | 0o777, target: bytes.Repeat([]byte("x/"), 2047)},
		"longest":    {mode: unix.S_IFLNK | 0o777, target: append(bytes.Repeat([]byte("x/"), 2047), 'y')},
		"short link": {mode: unix.S_IFLNK | 0o777, target: []byte("y")},
	}
	for n := 3000; n < 3200; n += 9 {
		files[fmt.Sprint("link-", n)] = inode{mode: unix.S_IFLNK | 0o777, target: bytes.Repeat([]byte("z"), n)}
	}
	s := new(synth).root()
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		s.add(1, 0, name, files[name])
	}
	root := mountTree(t, writeTo(t, Chain{s.file(t, "1")}))
	for name, i := range files {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(root, name), &st))
		size := int64(i.size)
		if i.target != nil {
			size = int64(len(i.target))
			if target, err := os.Readlink(filepath.Join(root, name)); target != string(i.target) {
				t.Errorf("%s: target has %d bytes, %v", name, len(target), err)
			}
		}
		if st.Mode != i.mode || st.Size != size || st.Uid != i.uid || st.Gid != i.gid || st.Mtim.Sec != i.sec || st.Mtim.Nsec != int64(i.nsec) || st.Rdev != i.rdev {
			t.Errorf("%s: %+v, want %+v", name, st, i)
		}
	}
	for _, name := range []string{"largest", "8TiB+1"} {
		f, err := os.Open(filepath.Join(root, name))
		must(t, err)
		b := []byte{1, 2, 3}
		if n, err := f.ReadAt(b, int64(files[name].size)-3); n != 3 || b[0]|b[1]|b[2] != 0 {
			t.Errorf("%s: the end of the hole reads %v, %d, %v", name, b, n, err)
		}
		f.Close()
	}
}

// TestLargeFiles: real sparse files beyond 4 GiB and 8 TiB, read through the overlay.
func TestLargeFiles(t *testing.T) {
	requireRoot(t)
	s := newStack(t, func() bool { return false })
	dir := t.TempDir()
	sizes := map[string]int64{"5g": 5 << 30, "9t": 9 << 40}
	for name, size := range sizes {
		f, err := os.Create(filepath.Join(dir, name))
		must(t, err)
		_, err = f.WriteAt([]byte("end"), size-3)
		f.Close()
		if errors.Is(err, unix.EFBIG) {
			delete(sizes, name) // a filesystem with smaller files
			must(t, os.Remove(f.Name()))
			continue
		}
		must(t, err)
	}
	s.add(dir)
	root := s.roots.mount(t, mountTree(t, writeTo(t, s.chain)))
	for name, size := range sizes {
		f, err := os.Open(filepath.Join(root, name))
		must(t, err)
		defer f.Close()
		b := make([]byte, 4)
		n, err := f.ReadAt(b, size-4)
		if fi, serr := f.Stat(); serr != nil || fi.Size() != size || string(b) != "\x00end" {
			t.Errorf("%s: %q, %d, %v, %v", name, b, n, err, serr)
		}
	}
}

// tmpfs mounts one: it holds xattrs of any size.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// TestLargeXattrs: values up to the longest that EROFS can hold, and no further.
func TestLargeXattrs(t *testing.T) {
	requireRoot(t)
	dir := tmpfs(t)
	set := func(name, attr string, size int) {
		t.Helper()
		p := filepath.Join(dir, name)
		if !exists(p) {
			must(t, os.WriteFile(p, []byte("data"), 0o644))
		}
		must(t, unix.Setxattr(p, attr, bytes.Repeat([]byte{'v'}, size), 0))
	}
	for i, size := range []int{0, 1, 3900, 3990, 4000, 4096, 20000, maxValue} {
		set(fmt.Sprintf("f%d", i), "trusted.x", size)
	}
	for i := range 4 {
		set("many", fmt.Sprint("trusted.m", i), 60000)
	}
	set("long", "trusted."+strings.Repeat("n", 255-len("trusted.")), 100)
	c, _ := captureTo(t, dir, "1", nil)
	f, err := os.Create(filepath.Join(t.TempDir(), "img"))
	must(t, err)
	defer f.Close()
	stats, err := Write(t.Context(), Chain{c}, f)
	must(t, err)
	judge(t, Chain{c}, f.Name(), stats)
	same(t, "xattrs", sums(list(t, dir)), sums(list(t, mountTree(t, f.Name()))))

	set("many", "trusted.m4", 60000)
	c, _ = captureTo(t, dir, "1", nil)
	if _, err := Write(t.Context(), Chain{c}, io.Discard); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "many") {
		t.Errorf("300 kB of xattrs: %v", err)
	}
	set("huge", "trusted.x", maxValue+1)
	if _, err := Capture(t.Context(), dir, "1", nil, io.Discard); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "huge") {
		t.Errorf("a value of 64 KiB: %v", err)
	}
}

// sums forgets contents: of a tree alone they are holes.
func sums(files map[string]file) map[string]file {
	for name, f := range files {
		f.Sum = ""
		files[name] = f
	}
	return files
}

// TestManyLayers: as many as an image may have.
func TestManyLayers(t *testing.T) {
	requireRoot(t)
	g := &gen{Rand: newRand(1), t: t, below: map[string]bool{}, depth: 1}
	var chain Chain
	var dirs []string
	byID := map[string]string{}
	for i := range 127 {
		dir := t.TempDir()
		g.layer(dir)
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("only-in-", i)), []byte("x"), 0o644))
		id := fmt.Sprint(i)
		c, _ := captureTo(t, dir, id, nil)
		chain, dirs, byID[id] = append(chain, c), append(dirs, dir), dir
	}
	r := newRoots(t)
	r.fill(t, chain, byID, func() bool { return g.IntN(2) == 0 })
	same(t, "127 layers", list(t, overlayLayers(t, dirs)), listTree(t, r.mount(t, mountTree(t, writeTo(t, chain)))))
}

// TestVerifyImage damages an image.
func TestVerifyImage(t *testing.T) {
	s := new(synth).root()
	for i := range 1000 {
		s.add(1, 0, fmt.Sprintf("%04d", i), inode{mode: unix.S_IFREG, size: 1})
	}
	var b bytes.Buffer
	_, err := Write(t.Context(), Chain{s.file(t, "1")}, &b)
	must(t, err)
	good := b.Bytes()
	name := filepath.Join(t.TempDir(), "img")
	check := func(what string, data []byte, is func(error) bool) {
		t.Helper()
		must(t, os.WriteFile(name, data, 0o600))
		if err := VerifyImage(name); !is(err) || err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
	}
	check("whole", good, func(err error) bool { return err == nil })
	for _, n := range []int{0, 1, erofs.SuperOffset, erofs.BlockSize - 1, erofs.BlockSize, len(good) - erofs.BlockSize, len(good) - 1} {
		check(fmt.Sprintf("cut off at %d", n), good[:n], errdefs.IsDataLoss)
	}
	check("longer", append(slices.Clone(good), 0), errdefs.IsDataLoss)
	for off := erofs.SuperOffset + 4; off < erofs.BlockSize; off += 11 {
		bad := slices.Clone(good)
		bad[off] ^= 0x10
		check(fmt.Sprintf("bit flipped at %d", off), bad, errdefs.IsDataLoss)
	}
	check("foreign", make([]byte, 1<<16), errdefs.IsInvalidArgument)
	rename := func(volume string) []byte {
		other := slices.Clone(good)
		copy(other[erofs.SuperOffset+64:], append([]byte(volume), make([]byte, 16-len(volume))...))
		sum := erofs.Checksum(other)
		for i := range 4 {
			other[erofs.SuperOffset+4+i] = byte(sum >> (8 * i))
		}
		return other
	}
	check("another version", rename("nhybrid-tree-2"), errdefs.IsFailedPrecondition)
	check("another program's", rename("composefs"), errdefs.IsInvalidArgument)
	if err := VerifyImage(name + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// TestWriteRefuses: what goes wrong outside is reported as it is.
func TestWriteRefuses(t *testing.T) {
	c := Chain{new(synth).root().file(t, "1")}
	if _, err := Write(t.Context(), c, failing{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Write(ctx, c, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Write(t.Context(), nil, io.Discard); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no layers: %v", err)
	}
	if _, err := Write(t.Context(), Chain{c[0] + "x"}, io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
