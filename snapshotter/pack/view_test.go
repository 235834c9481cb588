// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
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
	asRoot(t)
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
			noError(t, a.Apply(base))
			s.add(base)
			continue
		}
		upper, seen := s.container(func(root string) { noError(t, a.Apply(root)) })
		s.add(upper)
		same(t, fmt.Sprint("layer ", i), seen, s.view())
	}
}

// flat makes a layer of inodes in one directory.
func flat(names []string, inode func(i int) Inode) *Meta {
	m := tree(1)
	for i, name := range names {
		in := inode(i)
		in.Nlink = 1
		m.Root.Children = append(m.Root.Children, &Node{Name: name, Inode: &in})
	}
	return m
}

// mountSynthetic mounts the view of a layer that has metadata alone.
func mountSynthetic(t *testing.T, m *Meta) string {
	t.Helper()
	layers := synthetic(t, m)
	image, s := writeTo(t, layers)
	return mountView(t, image, s.Devices, layers, false)
}

// TestLargeDirectory has 100 000 names in one directory, some of them in front of
// "." and "..".
func TestLargeDirectory(t *testing.T) {
	asRoot(t)
	var names []string
	for i := range 100000 {
		names = append(names, fmt.Sprintf("%c-name-%d", "+-.a~"[i%5], i))
	}
	slices.Sort(names)
	m := flat(names, func(i int) Inode {
		return Inode{Mode: unix.S_IFREG | 0o644, UID: uint32(i), Size: 1, Data: Ref{1, uint32(i + 1)}, Block: uint32(i + 1)}
	})
	m.Numbers = uint32(len(names))
	view := mountSynthetic(t, m)
	entries, err := os.ReadDir(view + "/t")
	noError(t, err)
	if len(entries) != len(names) {
		t.Fatalf("%d entries, want %d", len(entries), len(names))
	}
	for i, e := range entries {
		var st unix.Stat_t
		noError(t, unix.Lstat(view+"/t/"+names[i], &st))
		if e.Name() != names[i] || st.Uid != uint32(i) {
			t.Fatalf("entry %d is %q of %d, want %q", i, e.Name(), st.Uid, names[i])
		}
		noError(t, unix.Lstat(view+"/h"+Ref{1, uint32(i + 1)}.Redirect(), &st))
	}
	if exists(view + "/t/none") {
		t.Error("a name that is not there is found")
	}
	dirs, err := os.ReadDir(view + "/h/1")
	noError(t, err)
	if len(dirs) != 256 {
		t.Errorf("h/1 has %d directories", len(dirs))
	}
}

// TestManyFiles: a layer of 20 000 files on disk.
func TestManyFiles(t *testing.T) {
	asRoot(t)
	dir := filepath.Join(tmpfs(t), "layer")
	for i := range 20000 {
		if i%40 == 0 {
			noError(t, os.MkdirAll(filepath.Join(dir, fmt.Sprintf("a%d/b%d", i/4000, i/40)), 0o755))
		}
		name := filepath.Join(dir, fmt.Sprintf("a%d/b%d/file-%d", i/4000, i/40, i))
		noError(t, os.WriteFile(name, []byte(fmt.Sprint(i)), os.FileMode(i%0o1000)))
	}
	i := 0
	s := newStack(t, func() bool { i++; return i%20 == 0 })
	s.add(dir)
	same(t, "20000 files", list(t, dir), s.view())
}

// tmpfs mounts one: it holds xattrs of any size.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	noError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// TestDirectorySizes: each number of names and length of names around the end of
// a block.
func TestDirectorySizes(t *testing.T) {
	asRoot(t)
	m := tree(1)
	want := map[string]int{}
	for i := range 300 {
		dir := &Node{Name: fmt.Sprintf("d%03d", i), Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}
		m.Root.Children = append(m.Root.Children, dir)
		n := i + 1
		if i >= 150 {
			n = 14 + i%20 // names of 255 bytes: 15 to a block
		}
		want[dir.Name] = n
		for j := range n {
			name := fmt.Sprintf("%03d-%s", j, strings.Repeat("x", i%50))
			if i >= 150 {
				name = fmt.Sprintf("%03d%s", j, strings.Repeat("y", 252-i%3))
			}
			dir.Children = append(dir.Children, &Node{Name: name, Inode: &Inode{Mode: unix.S_IFIFO | 0o600, Nlink: 1}})
		}
	}
	root := mountSynthetic(t, m) + "/t"
	for dir, n := range want {
		entries, err := os.ReadDir(filepath.Join(root, dir))
		noError(t, err)
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

// TestViewExtremes: values at the ends of their ranges, through kernel, fsck.erofs and
// go-erofs.
func TestViewExtremes(t *testing.T) {
	asRoot(t)
	reg := func(f func(*Inode)) Inode { i := Inode{Mode: unix.S_IFREG | 0o644}; f(&i); return i }
	files := map[string]Inode{
		"owner":      reg(func(i *Inode) { i.UID, i.GID = 1<<32-2, 1<<32-3 }),
		"past":       reg(func(i *Inode) { i.Sec, i.Nsec = -1<<40, 999999999 }),
		"future":     reg(func(i *Inode) { i.Sec, i.Nsec = 1<<40, 1 }),
		"sticky":     {Mode: unix.S_IFREG | 0o7777},
		"device":     {Mode: unix.S_IFBLK | 0o600, Rdev: unix.Mkdev(4095, 1<<20-1)},
		"null":       {Mode: unix.S_IFCHR | 0o600, Rdev: unix.Mkdev(1, 3)},
		"block 0:0":  {Mode: unix.S_IFBLK | 0o600},
		"longest":    {Mode: unix.S_IFLNK | 0o777, Inline: strings.Repeat("x/", 2047) + "y"},
		"short link": {Mode: unix.S_IFLNK | 0o777, Inline: "y"},
	}
	for n := 3000; n < 3200; n += 9 {
		files[fmt.Sprint("link-", n)] = Inode{Mode: unix.S_IFLNK | 0o777, Inline: strings.Repeat("z", n)}
	}
	for i, size := range []int64{1, 4096, 4097, 1<<32 - 1, 1 << 32, 1<<32 + 1, 8 << 40, 8<<40 + 1} {
		files[fmt.Sprint("size-", size)] = reg(func(in *Inode) { in.Size, in.Data, in.Block = size, Ref{1, uint32(i + 1)}, 1 })
	}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	m := flat(names, func(i int) Inode { return files[names[i]] })
	m.Numbers = 8
	layers := synthetic(t, m)
	layers[0].blocks = 1<<31 + 2
	image, s := writeTo(t, layers)
	view := mountView(t, image, s.Devices, layers, false)
	for name, i := range files {
		var st unix.Stat_t
		noError(t, unix.Lstat(filepath.Join(view, "t", name), &st))
		size := i.Size + int64(len(i.Inline))
		if i.Inline != "" {
			if target, err := os.Readlink(filepath.Join(view, "t", name)); target != i.Inline {
				t.Errorf("%s: target has %d bytes, %v", name, len(target), err)
			}
		}
		if st.Mode != i.Mode || st.Size != size || st.Uid != i.UID || st.Gid != i.GID || st.Mtim.Sec != i.Sec || st.Mtim.Nsec != int64(i.Nsec) || st.Rdev != i.Rdev {
			t.Errorf("%s: %+v, want %+v", name, st, i)
		}
		if i.HasData() {
			noError(t, unix.Lstat(view+"/h"+i.Data.Redirect(), &st))
			if st.Size != size {
				t.Errorf("h%s has %d bytes, want %d", i.Data.Redirect(), st.Size, size)
			}
		}
	}
}

// TestLargeFiles: real sparse files beyond 4 GiB and 8 TiB, read through the
// overlay.
func TestLargeFiles(t *testing.T) {
	asRoot(t)
	s := newStack(t, func() bool { return false })
	dir := t.TempDir()
	sizes := map[string]int64{"5g": 5 << 30, "9t": 9 << 40}
	for name, size := range sizes {
		f, err := os.Create(filepath.Join(dir, name))
		noError(t, err)
		_, err = f.WriteAt([]byte("end"), size-3)
		f.Close()
		if errors.Is(err, unix.EFBIG) {
			delete(sizes, name) // a filesystem with smaller files
			noError(t, os.Remove(f.Name()))
			continue
		}
		noError(t, err)
	}
	s.add(dir)
	root := mountContainer(t, s.mount(), s.nvm)
	for name, size := range sizes {
		f, err := os.Open(filepath.Join(root, name))
		noError(t, err)
		defer f.Close()
		b := make([]byte, 4)
		n, err := f.ReadAt(b, size-4)
		if fi, serr := f.Stat(); serr != nil || fi.Size() != size || string(b) != "\x00end" {
			t.Errorf("%s: %q, %d, %v, %v", name, b, n, err, serr)
		}
	}
}

// TestLargeXattrs: values up to the longest that EROFS can hold, and no further.
func TestLargeXattrs(t *testing.T) {
	asRoot(t)
	dir := tmpfs(t)
	set := func(name, attr string, size int) {
		t.Helper()
		p := filepath.Join(dir, name)
		if !exists(p) {
			noError(t, os.WriteFile(p, []byte("data"), 0o644))
		}
		noError(t, unix.Setxattr(p, attr, bytes.Repeat([]byte{'v'}, size), 0))
	}
	for i, size := range []int{0, 1, 3900, 3990, 4000, 4096, 20000, erofs.XattrValueMax} {
		set(fmt.Sprintf("f%d", i), "trusted.x", size)
	}
	for i := range 4 {
		set("many", fmt.Sprint("trusted.m", i), 60000)
	}
	set("long", "trusted."+strings.Repeat("n", 255-len("trusted.")), 100)
	s := newStack(t, func() bool { return false })
	s.add(dir)
	same(t, "xattrs", list(t, dir), s.view())

	set("many", "trusted.m4", 60000)
	m, _, _, err := Scan(t.Context(), dir, 1, nil)
	noError(t, err)
	for _, in := range m.dataFiles() {
		in.Block = in.Data.Number
	}
	if _, err := WriteView(t.Context(), Chain{m}, map[uint64]uint32{1: 100}, io.Discard); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "many") {
		t.Errorf("300 kB of xattrs: %v", err)
	}
	set("huge", "trusted.x", erofs.XattrValueMax+1)
	if _, _, _, err := Scan(t.Context(), dir, 1, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "huge") {
		t.Errorf("a value of 64 KiB: %v", err)
	}
}

// TestVerifyView damages a view.
func TestVerifyView(t *testing.T) {
	var names []string
	for i := range 1000 {
		names = append(names, fmt.Sprintf("%04d", i))
	}
	m := flat(names, func(i int) Inode {
		return Inode{Mode: unix.S_IFREG, Size: 1, Data: Ref{1, uint32(i + 1)}, Block: uint32(i + 1)}
	})
	var b bytes.Buffer
	_, err := WriteView(t.Context(), Chain{m}, map[uint64]uint32{1: 1001}, &b)
	noError(t, err)
	good := b.Bytes()
	name := filepath.Join(t.TempDir(), "img")
	whole := func(err error) bool { return err == nil }
	check := func(what string, data []byte, is, deep func(error) bool) {
		t.Helper()
		noError(t, os.WriteFile(name, data, 0o600))
		if err := VerifyView(name); !is(err) || err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
		if err := VerifyViewDeep(name); !deep(err) || err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s, deep: %v", what, err)
		}
		if devices, err := ViewDevices(name); !is(err) || err == nil && !slices.Equal(devices, []uint64{1}) {
			t.Errorf("%s: devices %d, %v", what, devices, err)
		}
	}
	check("whole", good, whole, whole)
	image := len(good) - viewFooterSize
	for _, n := range []int{0, 1, erofs.SuperOffset, erofs.BlockSize - 1, erofs.BlockSize, image - erofs.BlockSize, image, len(good) - 1} {
		check(fmt.Sprintf("cut off at %d", n), good[:n], errdefs.IsDataLoss, errdefs.IsDataLoss)
	}
	check("longer", append(slices.Clone(good), 0), errdefs.IsDataLoss, errdefs.IsDataLoss)
	flip := func(off int, is func(error) bool) {
		bad := slices.Clone(good)
		bad[off] ^= 0x10
		check(fmt.Sprintf("bit flipped at %d", off), bad, is, errdefs.IsDataLoss)
	}
	for off := erofs.SuperOffset + 4; off < erofs.BlockSize; off += 11 {
		flip(off, errdefs.IsDataLoss)
	}
	for off := erofs.BlockSize; off < image; off += 997 {
		flip(off, whole) // only a look at all of it finds that
	}
	for off := image; off < len(good); off++ {
		is := errdefs.IsDataLoss
		if at := off - image - len(viewMagic); at >= 0 && at < 4 {
			is = whole // the checksum itself
		}
		flip(off, is)
	}
	check("foreign", make([]byte, 1<<16), errdefs.IsInvalidArgument, errdefs.IsInvalidArgument)
	rename := func(volume string) []byte {
		other := slices.Clone(good)
		copy(other[erofs.SuperOffset+64:], append([]byte(volume), make([]byte, 16-len(volume))...))
		erofs.SetChecksum(other)
		return other
	}
	check("another version", rename("nhybrid-view-2"), errdefs.IsFailedPrecondition, errdefs.IsFailedPrecondition)
	check("another program's", rename("composefs"), errdefs.IsInvalidArgument, errdefs.IsInvalidArgument)
	if err := VerifyView(name + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
