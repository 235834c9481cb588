// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// mountPack mounts a pack as the kernel reads it from its file.
func mountPack(t testing.TB, path string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(path, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount pack: %v", err)
	}
	t.Cleanup(func() { noError(t, unix.Unmount(dir, 0)) })
	return dir
}

// judge puts a pack before fsck.erofs and dump.erofs.
func judge(t testing.TB, path string) {
	t.Helper()
	for _, cmd := range []*exec.Cmd{
		exec.Command("fsck.erofs", path),
		exec.Command("fsck.erofs", "--extract", path),
		exec.Command("dump.erofs", "-s", path),
		exec.Command("dump.erofs", "-S", path),
	} {
		if _, err := exec.LookPath(cmd.Args[0]); err != nil {
			t.Skipf("needs erofs-utils: %v", err)
		}
		if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("<E>")) {
			t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
		}
	}
}

// TestKernel: fsck.erofs, dump.erofs and the kernel accept packs, and the kernel shows what is in them.
func TestKernel(t *testing.T) {
	asRoot(t)
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newMaker(t, 3)
			r := rand.New(rand.NewPCG(seed, 1))
			m.random(r, 300)
			p := m.finish()
			judge(t, p.File().Name())
			dir := mountPack(t, p.File().Name())
			m.compare(dir)
			// Holes that are filled are seen through the mount that was there before.
			m.checkData(p)
			clear(m.hole)
			m.compare(dir)
		})
	}
}

// TestLoop: a pack, whose size is no multiple of a sector, is read through a loop device.
func TestLoop(t *testing.T) {
	asRoot(t)
	m := newMaker(t, 3)
	m.random(rand.New(rand.NewPCG(1, 1)), 100)
	p := m.finish()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", p.File().Name(), dir).CombinedOutput(); err != nil {
		t.Skipf("needs loop devices: %v: %s", err, out)
	}
	t.Cleanup(func() { noError(t, unix.Unmount(dir, 0)) })
	m.compare(dir)
}

// TestDeviceZero: overlayfs takes a device 0:0 for a whiteout, whoever made it, and so do packs.
func TestDeviceZero(t *testing.T) {
	m := newMaker(t, 3)
	zero := &Inode{Mode: unix.S_IFCHR | 0o644, UID: 5, Nlink: 2}
	for _, name := range []string{"a", "b"} {
		m.add(m.meta.Root, name, zero)
	}
	m.add(m.meta.Root, "c", nil)
	got, err := m.finish().Meta(t.Context())
	noError(t, err)
	for _, c := range got.Root.Children {
		if !c.Whiteout() {
			t.Errorf("%q is %+v", c.Name, c.Inode)
		}
	}
	if n := m.inodes(); n != 2 || len(got.Root.Children) != 3 {
		t.Errorf("%d inodes, %d names", n, len(got.Root.Children))
	}
}

// compare compares each name in dir with the layer.
func (m *maker) compare(dir string) {
	t := m.t
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	noError(t, err)
	defer unix.Close(fd)
	inos := map[*Inode]uint64{}
	whites := 0
	var visit func(at int, path string, n *Node)
	visit = func(at int, path string, n *Node) {
		name := n.Name
		if name == "" {
			name = "."
		}
		var st unix.Stat_t
		noError(t, unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW))
		self := fmt.Sprintf("/proc/self/fd/%d/%s", at, name)
		if n.Whiteout() {
			if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 || len(listXattrs(t, self)) > 0 {
				t.Fatalf("%q is no whiteout: %+v", path, st)
			}
			whites++
			return
		}
		in := n.Inode
		size := in.Size
		if in.Mode&unix.S_IFMT == unix.S_IFLNK {
			size = int64(len(in.Inline))
		}
		if n.Dir() {
			size = st.Size
		} else if st.Nlink != uint64(in.Nlink) {
			t.Fatalf("%q has %d links, want %d", path, st.Nlink, in.Nlink)
		}
		if st.Mode != in.Mode || st.Uid != in.UID || st.Gid != in.GID || st.Mtim.Sec != in.Sec || uint32(st.Mtim.Nsec) != in.Nsec || st.Rdev != in.Rdev || st.Size != size {
			t.Fatalf("%q: %+v, want %+v", path, st, *in)
		}
		if ino, seen := inos[in]; seen && ino != st.Ino {
			t.Fatalf("%q is not a hard link", path)
		}
		inos[in] = st.Ino
		var want []Xattr
		for name, value := range eachXattr(in, m.meta.Layer) {
			want = append(want, Xattr{name, value})
		}
		slices.SortFunc(want, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
		if got := listXattrs(t, self); !slices.Equal(got, want) {
			t.Fatalf("%q has xattrs %q, want %q", path, got, want)
		}
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if target, err := os.Readlink(self); err != nil || target != in.Inline {
				t.Fatalf("%q leads to %q (%v), want %q", path, target, err, in.Inline)
			}
		case unix.S_IFREG:
			want := m.data[in.Data.Number]
			if in.Inline != "" {
				want = []byte(in.Inline)
			}
			// A hole that is read stays zero in the page cache of the mount.
			if m.hole[in.Data.Number] || in.Size > 1<<20 || in.Data.Layer != m.meta.Layer {
				break
			}
			if b, err := os.ReadFile(self); err != nil || !bytes.Equal(b, want) {
				t.Fatalf("%q has other bytes, %v", path, err)
			}
		case unix.S_IFDIR:
			fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			noError(t, err)
			f := os.NewFile(uintptr(fd), path)
			defer f.Close()
			names, err := f.Readdirnames(-1)
			noError(t, err)
			if len(names) != len(n.Children) {
				t.Fatalf("%q has names %q, want %d", path, names, len(n.Children))
			}
			for i, c := range n.Children {
				if names[i] != c.Name {
					t.Fatalf("%q has name %q, want %q", path, names[i], c.Name)
				}
				visit(fd, path+"/"+c.Name, c)
			}
		}
	}
	visit(fd, "", m.meta.Root)
	if len(inos)+min(whites, 1) != int(m.inodes()) {
		t.Fatalf("%d inodes and %d whiteouts, the superblock says %d", len(inos), whites, m.inodes())
	}
}

// inodes is the number of inodes that the superblock tells.
func (m *maker) inodes() uint64 {
	s, err := erofs.ReadSuper(m.bytes()[:BlockSize], "", "pack", volumeName)
	noError(m.t, err)
	return s.Inos
}

func listXattrs(t testing.TB, path string) (list []Xattr) {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	noError(t, err)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, value)
		noError(t, err)
		list = append(list, Xattr{name, string(value[:n])})
	}
	slices.SortFunc(list, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// TestOverlay: overlayfs takes packs for lower directories: whiteouts, opaque directories, references.
func TestOverlay(t *testing.T) {
	asRoot(t)
	lower := newMaker(t, 1)
	for _, name := range []string{"gone", "kept"} {
		lower.add(lower.meta.Root, name, lower.file([]byte(name), false))
	}
	for _, name := range []string{"opaque", "merged"} {
		d := lower.dir(lower.meta.Root, name)
		lower.add(d, "below", lower.file([]byte("below"), false))
	}
	upper := newMaker(t, 2)
	upper.add(upper.meta.Root, "gone", nil)
	content := bytes.Repeat([]byte("referred"), 1000)
	ref := &Inode{Mode: unix.S_IFREG | 0o600, Nlink: 1, Size: int64(len(content)), Data: Ref{9, 0x1a5}}
	upper.add(upper.meta.Root, "ref", ref)
	d := upper.dir(upper.meta.Root, "opaque")
	d.Inode.Opaque = true
	upper.add(d, "above", upper.file([]byte("above"), false))
	upper.add(upper.dir(upper.meta.Root, "merged"), "above", upper.file([]byte("above"), false))

	data := t.TempDir()
	noError(t, os.MkdirAll(filepath.Join(data, filepath.Dir(ref.Data.Redirect())), 0o755))
	noError(t, os.WriteFile(filepath.Join(data, ref.Data.Redirect()), content, 0o600))
	dir := t.TempDir()
	lowers := mountPack(t, upper.finish().File().Name()) + ":" + mountPack(t, lower.finish().File().Name()) + "::" + data
	noError(t, unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "metacopy=on,redirect_dir=on,lowerdir="+lowers))
	defer func() { noError(t, unix.Unmount(dir, 0)) }()
	for name, want := range map[string]string{"kept": "kept", "opaque/above": "above", "merged/above": "above", "merged/below": "below", "ref": string(content)} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %.20q, %v", name, b, err)
		}
	}
	for _, name := range []string{"gone", "opaque/below"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLargeFile: data that are larger than buffers and pieces, through the kernel.
func TestLargeFile(t *testing.T) {
	asRoot(t)
	var told []int64
	w, err := Create(filepath.Join(t.TempDir(), "p"), WriterOptions{Flushed: func(f *os.File, off, n int64) { told = append(told, off, off+n) }})
	noError(t, err)
	defer w.Close()
	const size = 33<<20 + 1
	m := &Meta{Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}}
	r := rand.NewChaCha8([32]byte{1})
	h := sha256.New()
	n, _, err := w.Begin(size)
	noError(t, err)
	_, err = io.CopyN(w, io.TeeReader(r, h), size)
	noError(t, err)
	_, err = w.End()
	noError(t, err)
	m.Root.Children = []*Node{{Name: "f", Inode: &Inode{Mode: unix.S_IFREG | 0o644, Size: size, Data: Ref{0, n}}}}
	s, err := w.Finish(m, Identity{})
	noError(t, err)
	// Each byte behind block 0 is told once, in order, in pieces of about 4 MiB.
	if len(told)/2 < 8 || told[0] != BlockSize || told[len(told)-1] != s.Size {
		t.Errorf("flushed %v of %d bytes", told, s.Size)
	}
	for i := 2; i < len(told); i += 2 {
		if told[i] != told[i-1] || told[i]-told[i-2] < 4<<20 || told[i]-told[i-2] > 5<<20 {
			t.Errorf("flushed %v", told)
		}
	}
	f, err := os.Open(filepath.Join(mountPack(t, w.File().Name()), "f"))
	noError(t, err)
	defer f.Close()
	got := sha256.New()
	_, err = io.Copy(got, f)
	noError(t, err)
	if !bytes.Equal(got.Sum(nil), h.Sum(nil)) {
		t.Error("the kernel reads other bytes")
	}
}
