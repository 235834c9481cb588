// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestExtremes: values at the ends of their ranges, through the kernel and back.
func TestExtremes(t *testing.T) {
	asRoot(t)
	m := newMaker(t, 1<<64-1)
	root := m.meta.Root
	root.Inode.Mode = unix.S_IFDIR | 0o7777
	root.Inode.Opaque = true
	reg := func(f func(*Inode)) *Inode { i := &Inode{Mode: unix.S_IFREG | 0o644}; f(i); return i }
	ref := Ref{1<<64 - 2, 1<<32 - 1}
	for name, i := range map[string]*Inode{
		"8TiB":                      reg(func(i *Inode) { i.Size, i.Data = 8<<40, ref }),
		"8TiB+1":                    reg(func(i *Inode) { i.Size, i.Data = 8<<40+1, ref }),
		"largest":                   reg(func(i *Inode) { i.Size, i.Data = 1<<63-1, ref }),
		"owner":                     reg(func(i *Inode) { i.UID, i.GID = 1<<32-2, 1<<32-3 }),
		"past":                      reg(func(i *Inode) { i.Sec, i.Nsec = -1<<40, 999999999 }),
		"future":                    reg(func(i *Inode) { i.Sec, i.Nsec = 1<<40, 1 }),
		"device":                    {Mode: unix.S_IFBLK | 0o600, Rdev: unix.Mkdev(4095, 1<<20-1)},
		"null":                      {Mode: unix.S_IFCHR | 0o600, Rdev: unix.Mkdev(1, 3)},
		"block 0:0":                 {Mode: unix.S_IFBLK | 0o600},
		"longest":                   {Mode: unix.S_IFLNK | 0o777, Inline: strings.Repeat("x/", 2047) + "y"},
		strings.Repeat("\xff", 255): {Mode: unix.S_IFLNK | 0o777, Inline: "\xff"},
		"\x01":                      {Mode: unix.S_IFIFO},
	} {
		m.add(root, name, i)
	}
	for n := 3000; n < 3200; n += 9 {
		m.add(root, fmt.Sprint("link-", n), &Inode{Mode: unix.S_IFLNK | 0o777, Inline: strings.Repeat("z", n)})
	}
	for i, size := range []int{0, 1, 3900, 3990, 4000, 4096, 20000, 1<<16 - 1} {
		m.add(root, fmt.Sprint("xattr", i), reg(func(i *Inode) {
			i.Xattrs = []Xattr{{"trusted." + strings.Repeat("n", 255-len("trusted.")), "v"}, {"trusted.x", strings.Repeat("v", size)}}
		}))
	}
	m.add(root, "xattrs", reg(func(i *Inode) {
		for n := range 4 {
			i.Xattrs = append(i.Xattrs, Xattr{fmt.Sprint("security.x", n), strings.Repeat("v", 60000)})
		}
	}))
	for _, c := range root.Children {
		c.Inode.Nlink = 1
	}
	p := m.finish()
	judge(t, p.File().Name())
	m.compare(mountPack(t, p.File().Name()))
	got, err := p.Meta(t.Context())
	noError(t, err)
	sameMeta(t, m.meta, got)
}

// TestDirectories: large ones with names before and behind "." and "..", sizes around the end of a block.
func TestDirectories(t *testing.T) {
	asRoot(t)
	m := newMaker(t, 1)
	file := func(i int) *Inode { return &Inode{Mode: unix.S_IFREG | 0o644, UID: uint32(i), Nlink: 1} }
	large := m.dir(m.meta.Root, "large")
	for k, c := range "+-.a~" {
		for i := range 20000 {
			large.Children = append(large.Children, &Node{Name: fmt.Sprintf("%c-name-%05d", c, i), Inode: file(k*20000 + i)})
		}
	}
	for i := range 300 {
		dir := m.dir(m.meta.Root, fmt.Sprintf("d%03d", i))
		n := i + 1
		if i >= 150 {
			n = 14 + i%20 // names of 255 bytes: 15 to a block
		}
		for j := range n {
			name := fmt.Sprintf("%03d-%s", j, strings.Repeat("x", i%50))
			if i >= 150 {
				name = fmt.Sprintf("%03d%s", j, strings.Repeat("y", 252-i%3))
			}
			m.add(dir, name, file(j))
		}
	}
	p := m.finish()
	judge(t, p.File().Name())
	got, err := p.Meta(t.Context())
	noError(t, err)
	sameMeta(t, m.meta, got)
	m.compare(mountPack(t, p.File().Name()))
}

// TestDeep: as deep as PATH_MAX lets nobody go by one path. fsck.erofs 1.5 crashes beyond PATH_MAX.
func TestDeep(t *testing.T) {
	asRoot(t)
	m := newMaker(t, 1)
	deep := m.meta.Root
	for i := range 3000 {
		deep = m.dir(deep, fmt.Sprint("deep", i))
	}
	m.add(deep, "bottom", m.file([]byte("bottom"), false))
	p := m.finish()
	got, err := p.Meta(t.Context())
	noError(t, err)
	sameMeta(t, m.meta, got)
	m.compare(mountPack(t, p.File().Name()))
}

// TestDepth: what is deeper than the limit is refused, and what is not comes back.
func TestDepth(t *testing.T) {
	for depth, fits := range map[int]bool{depthMax: true, depthMax + 1: false} {
		m := newMaker(t, 1)
		dir := m.meta.Root
		for range depth {
			dir = m.dir(dir, "d")
		}
		_, err := m.w.Finish(m.meta, Identity{Layer: 1})
		if fits != (err == nil) || !fits && !errdefs.IsInvalidArgument(err) {
			t.Errorf("depth %d: %v", depth, err)
		}
		if !fits {
			continue
		}
		p, err := Open(m.w.File().Name())
		noError(t, err)
		defer p.Close()
		got, err := p.Meta(t.Context())
		noError(t, err)
		sameMeta(t, m.meta, got)
	}
}

// TestFinishRefuses: what cannot stand in a pack is refused and named.
func TestFinishRefuses(t *testing.T) {
	const reg, dir = unix.S_IFREG, unix.S_IFDIR
	x := func(name string, size int) []Xattr { return []Xattr{{name, strings.Repeat("v", size)}} }
	shared := &Inode{Mode: reg, Nlink: 3}
	for what, nodes := range map[string][]*Node{
		"empty name":        {{Name: "", Inode: &Inode{Mode: reg}}},
		"dot":               {{Name: ".", Inode: &Inode{Mode: reg}}},
		"dot dot":           {{Name: "..", Inode: &Inode{Mode: reg}}},
		"slash":             {{Name: "a/b", Inode: &Inode{Mode: reg}}},
		"nul":               {{Name: "a\x00", Inode: &Inode{Mode: reg}}},
		"long name":         {{Name: strings.Repeat("n", 256)}},
		"out of order":      {{Name: "b"}, {Name: "a"}},
		"twice":             {{Name: "a"}, {Name: "a"}},
		"type":              {{Name: "a", Inode: &Inode{Mode: 0o644}}},
		"mode":              {{Name: "a", Inode: &Inode{Mode: reg | 1<<16}}},
		"nanoseconds":       {{Name: "a", Inode: &Inode{Mode: reg, Nsec: 1e9}}},
		"negative size":     {{Name: "a", Inode: &Inode{Mode: reg, Size: -1}}},
		"no data":           {{Name: "a", Inode: &Inode{Mode: reg, Size: 1}}},
		"inline, too large": {{Name: "a", Inode: inlineFile(make([]byte, InlineMax+1))}},
		"inline and data":   {{Name: "a", Inode: &Inode{Mode: reg, Size: 5, Inline: "12345", Data: Ref{1, 1}}}},
		"inline, too short": {{Name: "a", Inode: &Inode{Mode: reg, Size: 5, Inline: "1234"}}},
		"inline of none":    {{Name: "a", Inode: &Inode{Mode: unix.S_IFIFO, Inline: "1"}}},
		"unknown number":    {{Name: "a", Inode: &Inode{Mode: reg, Size: 5, Data: Ref{1, 2}}}},
		"another size":      {{Name: "a", Inode: &Inode{Mode: reg, Size: 6, Data: Ref{1, 1}}}},
		"number twice":      {{Name: "a", Inode: &Inode{Mode: reg, Size: 5, Data: Ref{1, 1}}}, {Name: "b", Inode: &Inode{Mode: reg, Size: 5, Data: Ref{1, 1}}}},
		"reference to 0":    {{Name: "a", Inode: &Inode{Mode: reg, Size: 5, Data: Ref{2, 0}}}},
		"no target":         {{Name: "a", Inode: &Inode{Mode: unix.S_IFLNK}}},
		"long target":       {{Name: "a", Inode: &Inode{Mode: unix.S_IFLNK, Inline: strings.Repeat("t", 4096)}}},
		"nul in target":     {{Name: "a", Inode: &Inode{Mode: unix.S_IFLNK, Inline: "a\x00"}}},
		"device number":     {{Name: "a", Inode: &Inode{Mode: unix.S_IFBLK, Rdev: unix.Mkdev(1<<12, 0)}}},
		"names in a file":   {{Name: "a", Inode: &Inode{Mode: reg}, Children: []*Node{{Name: "b"}}}},
		"names in whiteout": {{Name: "a", Children: []*Node{{Name: "b"}}}},
		"opaque file":       {{Name: "a", Inode: &Inode{Mode: reg, Opaque: true}}},
		"implied file":      {{Name: "a", Inode: &Inode{Mode: reg, Implied: true}}},
		"links":             {{Name: "a", Inode: shared}, {Name: "b", Inode: shared}},
		"value of 64 KiB":   {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("trusted.x", 1<<16)}}},
		"long xattr":        {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("trusted."+strings.Repeat("n", 248), 1)}}},
		"unknown xattr":     {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("system.x", 1)}}},
		"empty xattr":       {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("trusted.", 1)}}},
		"overlay's xattr":   {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("trusted.overlay.redirect", 1)}}},
		"overlay's xattr 2": {{Name: "a", Inode: &Inode{Mode: reg, Xattrs: x("user.overlay.metacopy", 1)}}},
		"our xattr":         {{Name: "a", Inode: &Inode{Mode: dir, Xattrs: x(XattrImplied, 1)}}},
		"xattr order":       {{Name: "a", Inode: &Inode{Mode: dir, Xattrs: append(x("user.b", 1), x("user.a", 1)...)}}},
		"xattr twice":       {{Name: "a", Inode: &Inode{Mode: dir, Xattrs: append(x("user.b", 1), x("user.b", 1)...)}}},
		"too many xattrs":   {{Name: "a", Inode: &Inode{Mode: dir, Xattrs: append(append(x("user.a", 65000), x("user.b", 65000)...), append(x("user.c", 65000), append(x("user.d", 65000), x("user.e", 5000)...)...)...)}}},
	} {
		t.Run(what, func(t *testing.T) {
			m := newMaker(t, 1)
			m.file([]byte("12345"), false)
			m.meta.Root.Children = []*Node{{Name: "dir", Inode: &Inode{Mode: dir}, Children: nodes}}
			_, err := m.w.Finish(m.meta, Identity{Layer: 1})
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"/dir`) {
				t.Error(err)
			}
			if _, err := Open(m.w.File().Name()); !errdefs.IsDataLoss(err) {
				t.Errorf("what was refused opens: %v", err)
			}
		})
	}
	for what, m := range map[string]*Meta{
		"no root": {Layer: 1}, "file as root": {Layer: 1, Root: &Node{Inode: &Inode{Mode: reg}}}, "whiteout as root": {Layer: 1, Root: &Node{}},
		"another layer": {Root: &Node{Inode: &Inode{Mode: dir}}}, "name": {Layer: 1, Root: &Node{Name: "/", Inode: &Inode{Mode: dir}}},
	} {
		if _, err := newMaker(t, 1).w.Finish(m, Identity{Layer: 1}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestWriterRefuses: calls that do not follow each other as they must.
func TestWriterRefuses(t *testing.T) {
	create := func() *Writer { return newMaker(t, 0).w }
	begun := func(size int64) *Writer {
		w := create()
		_, _, err := w.Begin(size)
		noError(t, err)
		return w
	}
	meta := &Meta{Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR}}}
	_, write := create().Write([]byte{1})
	_, more := begun(1).Write([]byte{1, 2})
	_, less := begun(2).End()
	_, _, twice := begun(2).Begin(1)
	_, unfinished := begun(1).Finish(meta, Identity{})
	_, end := create().End()
	hole := create().Hole(1)
	w := begun(2)
	_, err := w.Write([]byte{1})
	noError(t, err)
	late := w.Hole(1)
	w = begun(1)
	noError(t, w.Hole(1))
	_, behind := w.Write([]byte{1})
	w = create()
	_, err = w.Finish(meta, Identity{})
	noError(t, err)
	_, again := w.Finish(meta, Identity{})
	_, _, after := w.Begin(1)
	for what, err := range map[string]error{
		"write before begin": write, "more": more, "less": less, "begin twice": twice, "finish in a file": unfinished, "end before begin": end,
		"hole before begin": hole, "hole behind data": late, "data behind hole": behind, "finish twice": again, "begin after finish": after,
	} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, size := range []int64{0, -1, 1 << 44, 1<<63 - 1} {
		if _, _, err := create().Begin(size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size %d: %v", size, err)
		}
	}
}

// TestLargestPack: holes up to the last block that EROFS can number.
func TestLargestPack(t *testing.T) {
	w := newMaker(t, 0).w
	in := &Inode{Mode: unix.S_IFREG, Size: (1<<32 - 100) * BlockSize}
	_, _, err := w.Begin(in.Size)
	noError(t, err)
	noError(t, w.Hole(0))
	_, err = w.End()
	noError(t, err)
	if _, _, err := w.Begin(100 * BlockSize); !errdefs.IsInvalidArgument(err) {
		t.Errorf("beyond 2^32 blocks: %v", err)
	}
	n, block, err := w.Begin(1)
	noError(t, err)
	if n != 2 || block != 1<<32-99 {
		t.Errorf("file %d at block %d", n, block)
	}
	_, err = w.Write([]byte{1})
	noError(t, err)
	_, err = w.End()
	noError(t, err)
	meta := &Meta{Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR}, Children: []*Node{{Name: "a", Inode: in}}}}
	in.Data.Number = 1
	if _, err = w.Finish(meta, Identity{}); errors.Is(err, unix.EFBIG) {
		t.Skipf("the filesystem of the test has smaller files: %v", err)
	}
	noError(t, err)
	p, err := Open(w.File().Name())
	noError(t, err)
	defer p.Close()
	_, err = p.Meta(t.Context())
	noError(t, err)
}

// TestFull: a full disk is reported as it is, and Abort leaves nothing.
func TestFull(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	noError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { noError(t, unix.Unmount(dir, 0)) })
	path := filepath.Join(dir, "p")
	w, err := Create(path, WriterOptions{})
	noError(t, err)
	_, _, err = w.Begin(4 << 20)
	noError(t, err)
	for range 4 {
		_, err = w.Write(make([]byte, 1<<20))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := w.Finish(&Meta{}, Identity{}); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	noError(t, w.Abort())
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Error(err)
	}
}

// TestCreate: an older file is replaced, a symlink is not followed.
func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p")
	noError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	w, err := Create(path, WriterOptions{})
	noError(t, err)
	defer w.Close()
	if fi, err := os.Stat(path); err != nil || fi.Size() != 0 {
		t.Error(fi, err)
	}
	noError(t, os.Symlink(path, path+"x"))
	if _, err := Create(path+"x", WriterOptions{}); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
}
