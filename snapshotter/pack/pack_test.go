// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func asRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts")
	}
}

// maker makes a pack and keeps what it should hold.
type maker struct {
	t    testing.TB
	w    *Writer
	meta *Meta
	data map[uint32][]byte // of all files that were begun
	hole map[uint32]bool

	stats Stats // of Finish
}

func newMaker(t testing.TB, layer uint64) *maker {
	w, err := Create(filepath.Join(t.TempDir(), "pack.erofs"), WriterOptions{})
	noError(t, err)
	t.Cleanup(func() { w.Close() })
	return &maker{t: t, w: w, meta: &Meta{Layer: layer, Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}}, data: map[uint32][]byte{}, hole: map[uint32]bool{}}
}

// file stores data and returns an inode for it.
func (m *maker) file(data []byte, hole bool) *Inode {
	m.t.Helper()
	in := &Inode{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: int64(len(data))}
	if len(data) == 0 {
		return in
	}
	n, block, err := m.w.Begin(in.Size)
	noError(m.t, err)
	if in.Data = (Ref{m.meta.Layer, n}); hole {
		noError(m.t, m.w.Hole(Sum(0, data)))
	} else {
		for p := range slices.Chunk(data, 5000) {
			_, err := m.w.Write(p)
			noError(m.t, err)
		}
	}
	sum, err := m.w.End()
	noError(m.t, err)
	if sum != Sum(0, data) || block == 0 {
		m.t.Fatalf("file %d at block %d has sum %x, want %x", n, block, sum, Sum(0, data))
	}
	m.data[n], m.hole[n] = data, hole
	return in
}

// inlineFile is the inode of a small file.
func inlineFile(data []byte) *Inode {
	return &Inode{Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: int64(len(data)), Inline: string(data)}
}

// add puts a name below dir, in order.
func (m *maker) add(dir *Node, name string, in *Inode) *Node {
	n := &Node{Name: name, Inode: in}
	i, found := slices.BinarySearchFunc(dir.Children, name, func(c *Node, name string) int { return strings.Compare(c.Name, name) })
	if found {
		m.t.Fatalf("%q twice", name)
	}
	dir.Children = slices.Insert(dir.Children, i, n)
	return n
}

func (m *maker) dir(parent *Node, name string) *Node {
	return m.add(parent, name, &Inode{Mode: unix.S_IFDIR | 0o755})
}

func testIdentity(layer uint64) Identity {
	return Identity{Layer: layer, Blob: digest.FromString("blob"), DiffID: digest.FromString("tar"), Compressed: 5, Uncompressed: 1 << 40}
}

// finish finishes the pack and opens it.
func (m *maker) finish() *Pack {
	m.t.Helper()
	s, err := m.w.Finish(m.meta, testIdentity(m.meta.Layer))
	noError(m.t, err)
	m.stats = s
	p, err := Open(m.w.File().Name())
	noError(m.t, err)
	m.t.Cleanup(func() { p.Close() })
	if s.Size != p.Size() || s.Files != p.Identity().Files || s.Entries != p.Identity().Entries || s.DataBytes != p.Identity().DataBytes {
		m.t.Fatalf("%+v does not go with %d bytes and %+v", s, p.Size(), p.Identity())
	}
	return p
}

// bytes is the content of the pack.
func (m *maker) bytes() []byte {
	m.t.Helper()
	b, err := os.ReadFile(m.w.File().Name())
	noError(m.t, err)
	return b
}

// random fills the layer with everything that there may be in one.
func (m *maker) random(r *rand.Rand, names int) {
	dirs := []*Node{m.meta.Root}
	var linked []*Inode
	for i := range names {
		dir := dirs[r.IntN(len(dirs))]
		name := randomName(r, i)
		if r.IntN(12) == 0 {
			m.file(randomBytes(r, 1+r.IntN(9000)), r.IntN(2) == 0) // replaced: a number without an inode
		}
		if len(linked) > 0 && r.IntN(6) == 0 {
			in := linked[r.IntN(len(linked))]
			in.Nlink++
			m.add(dir, name, in)
			continue
		}
		var in *Inode
		switch r.IntN(11) {
		case 0:
		case 10:
			in = inlineFile(randomBytes(r, 1+r.IntN(InlineMax)))
		case 1, 2:
			in = &Inode{Mode: unix.S_IFDIR, Opaque: r.IntN(3) == 0, Implied: r.IntN(3) == 0}
		case 3:
			in = &Inode{Mode: unix.S_IFLNK, Inline: strings.Repeat("t/", r.IntN(2047)) + "x"}
		case 4:
			mode := []uint32{unix.S_IFCHR, unix.S_IFBLK}[r.IntN(2)]
			in = &Inode{Mode: mode, Rdev: unix.Mkdev(r.Uint32N(1<<12), r.Uint32N(1<<20)|1)}
		case 5:
			in = &Inode{Mode: []uint32{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFBLK}[r.IntN(3)]}
		case 6:
			size := int64(1) << r.IntN(63)
			in = &Inode{Mode: unix.S_IFREG, Size: size, Data: Ref{m.meta.Layer + 1 + r.Uint64N(3), 1 + r.Uint32N(1<<20)}}
			if size > 1<<50 {
				in.Size = 1<<50 + 1
			}
		default:
			in = m.file(randomBytes(r, []int{0, 1, 4095, 4096, 4097, r.IntN(30000)}[r.IntN(6)]), r.IntN(4) == 0)
		}
		if in != nil {
			in.Nlink = 1
			in.Mode = in.Mode&unix.S_IFMT | r.Uint32N(0o10000)
			in.UID, in.GID = r.Uint32()&^1, r.Uint32()&^1
			in.Sec, in.Nsec = r.Int64N(1<<34)-1<<33, r.Uint32N(1e9)
			randomXattrs(r, in)
			if in.Mode&unix.S_IFMT != unix.S_IFDIR && r.IntN(3) == 0 {
				linked = append(linked, in)
			}
		}
		n := m.add(dir, name, in)
		if n.Dir() {
			dirs = append(dirs, n)
		}
	}
}

// acl is the value of system.posix_acl_access: rwxr-x---.
const acl = "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// randomXattrs sets xattrs that the kernel shows: symlinks have no ACL, and only files and directories have user xattrs.
func randomXattrs(r *rand.Rand, in *Inode) {
	typ := in.Mode & unix.S_IFMT
	for _, name := range []string{"security.capability", "system.posix_acl_access", "trusted.x", "user.a", "user.long" + strings.Repeat("n", 200)} {
		value := string(randomBytes(r, r.IntN(100)))
		switch {
		case r.IntN(6) > 0, typ != unix.S_IFREG && typ != unix.S_IFDIR && strings.HasPrefix(name, "user."):
			continue
		case name == "security.capability":
			value = "\x01\x00\x00\x02" + strings.Repeat("\x05\x00\x00\x00", 4)
		case strings.HasPrefix(name, "system."):
			if value = acl; typ == unix.S_IFLNK {
				continue
			}
		}
		in.Xattrs = append(in.Xattrs, Xattr{name, value})
	}
}

func randomName(r *rand.Rand, i int) string {
	b := randomBytes(r, r.IntN(30))
	if r.IntN(20) == 0 {
		b = bytes.Repeat([]byte{'n'}, 240)
	}
	for j := range b {
		if b[j] == 0 || b[j] == '/' {
			b[j] = '.'
		}
	}
	return fmt.Sprintf("%s%d", b, i)
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// sameMeta compares two layers; names of one inode must be names of one inode in both.
func sameMeta(t testing.TB, want, got *Meta) {
	t.Helper()
	if want.Layer != got.Layer || want.Numbers != got.Numbers {
		t.Fatalf("layer %d with %d numbers, want %d with %d", got.Layer, got.Numbers, want.Layer, want.Numbers)
	}
	twin := map[*Inode]*Inode{}
	type pair struct {
		path string
		a, b *Node
	}
	for todo := []pair{{"", want.Root, got.Root}}; len(todo) > 0; {
		p := todo[0]
		todo = todo[1:]
		if p.a.Name != p.b.Name || len(p.a.Children) != len(p.b.Children) || p.a.Whiteout() != p.b.Whiteout() {
			t.Fatalf("%q: %q with %d names, want %q with %d", p.path, p.b.Name, len(p.b.Children), p.a.Name, len(p.a.Children))
		}
		for i, c := range p.a.Children {
			todo = append(todo, pair{p.path + "/" + c.Name, c, p.b.Children[i]})
		}
		if p.a.Whiteout() {
			continue
		}
		if other, seen := twin[p.a.Inode]; seen && other != p.b.Inode {
			t.Fatalf("%q has another inode", p.path)
		}
		twin[p.a.Inode] = p.b.Inode
		a, b := *p.a.Inode, *p.b.Inode
		if p.a.Dir() {
			b.Nlink = a.Nlink
		}
		if !slices.Equal(a.Xattrs, b.Xattrs) {
			t.Fatalf("%q: xattrs %q, want %q", p.path, b.Xattrs, a.Xattrs)
		}
		a.Xattrs, b.Xattrs = nil, nil
		if x, y := fmt.Sprintf("%+v", a), fmt.Sprintf("%+v", b); x != y {
			t.Fatalf("%q: %s, want %s", p.path, y, x)
		}
	}
}
