// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// forged is the metadata of a pack that somebody changes, by offsets in the file.
type forged struct {
	b    []byte
	base int
}

func (f *forged) inode(nid uint64) []byte { return f.b[f.base+int(nid)*erofs.SlotSize:] }

// find returns the inode of a path, and the entry of the directory that says it. All directories are inline.
func (f *forged) find(t testing.TB, path string) (inode, dirent []byte) {
	t.Helper()
	nid := uint64(packRootNid)
	for name := range strings.SplitSeq(path, "/") {
		raw, _ := erofs.ParseInode(f.inode(nid))
		dir := f.inode(nid)[erofs.InodeSize+raw.XattrSize:][:raw.Size]
		dirent = nil
		at := dir
		erofs.ParseDirents(dir, func(n uint64, _ byte, s string) bool {
			if s == name {
				dirent, nid = at, n
			}
			at = at[12:]
			return true
		})
		if dirent == nil {
			t.Fatalf("%q is not there", path)
		}
	}
	return f.inode(nid), dirent
}

// TestHostile: metadata with right checksums that nobody writes. Each is refused, and none costs more than its size.
func TestHostile(t *testing.T) {
	m := newMaker(t, 1)
	dir := func(parent *Node, name string, names int) *Node {
		d := m.dir(parent, name)
		for i := range names {
			m.add(d, string(rune('a'+i%26))+strings.Repeat("n", 200+i/26), &Inode{Mode: unix.S_IFIFO, Nlink: 1})
		}
		return d
	}
	root := m.meta.Root
	dir(dir(dir(root, "a", 0), "b", 0), "c", 1)
	dir(root, "large", 100)
	dir(root, "large2", 100)
	m.add(root, "file", m.file([]byte("12345"), false))
	m.add(root, "file2", m.file([]byte("12345"), false))
	m.add(root, "long", &Inode{Mode: unix.S_IFLNK, Inline: strings.Repeat("t", 4000), Nlink: 1})
	m.add(root, "ref", &Inode{Mode: unix.S_IFREG, Size: 5, Data: Ref{2, 1}, Nlink: 1})
	m.add(root, "small", inlineFile(bytes.Repeat([]byte{0xff}, InlineMax)))
	m.add(root, "white", nil)
	m.add(root, "xattr", &Inode{Mode: unix.S_IFREG, Nlink: 1, Xattrs: []Xattr{{"user.a", "v"}, {"user.b", "v"}}})
	p := m.finish()
	good := m.bytes()
	path := filepath.Join(t.TempDir(), "pack")
	le := binary.LittleEndian
	const offFormat, offXattrs, offMode, offSize, offU, offIno, offNsec, offNlink = 0, 2, 4, 8, 16, 20, 40, 44
	set16 := func(name string, off int, v uint16) func(*forged) {
		return func(f *forged) { i, _ := f.find(t, name); le.PutUint16(i[off:], v) }
	}
	set32 := func(name string, off int, v uint32) func(*forged) {
		return func(f *forged) { i, _ := f.find(t, name); le.PutUint32(i[off:], v) }
	}
	set64 := func(name string, off int, v uint64) func(*forged) {
		return func(f *forged) { i, _ := f.find(t, name); le.PutUint64(i[off:], v) }
	}
	point := func(from, to string) func(*forged) {
		return func(f *forged) {
			_, a := f.find(t, from)
			_, b := f.find(t, to)
			copy(a[:8], b[:8])
		}
	}
	for what, forge := range map[string]func(*forged){
		"loop":                   point("a/b/c", "a"),
		"loop to the root":       func(f *forged) { _, e := f.find(t, "a/b"); le.PutUint64(e, packRootNid) },
		"directory linked twice": point("large2", "large"),
		"file linked twice":      point("file2", "file"),
		"inode out of bounds":    func(f *forged) { _, e := f.find(t, "file"); le.PutUint64(e, 1<<40) },
		"largest inode number":   func(f *forged) { _, e := f.find(t, "file"); le.PutUint64(e, 1<<64-1) },
		"type":                   func(f *forged) { _, e := f.find(t, "file"); e[10] = 2 },
		"blocks shared": func(f *forged) {
			a, _ := f.find(t, "large")
			b, _ := f.find(t, "large2")
			copy(b[offU:][:4], a[offU:][:4])
		},
		"self": func(f *forged) {
			_, e := f.find(t, "a")
			nid := le.Uint64(e)
			i := f.inode(nid)
			le.PutUint64(i[erofs.InodeSize:], nid+1)
		},
		"name with a slash":     func(f *forged) { i, _ := f.find(t, "a/b"); i[erofs.InodeSize+12*3+3] = '/' },
		"names out of order":    func(f *forged) { i, _ := f.find(t, "a/b"); i[erofs.InodeSize+12*3+3] = '!' },
		"name offset":           func(f *forged) { i, _ := f.find(t, "a/b"); le.PutUint16(i[erofs.InodeSize+12+8:], 5) },
		"count of names":        func(f *forged) { i, _ := f.find(t, "a/b"); le.PutUint16(i[erofs.InodeSize+8:], 1<<16-4) },
		"no names":              set64("a/b", offSize, 0),
		"directory of 2^63":     set64("a/b", offSize, 1<<63),
		"directory of 1 GiB":    set64("large", offSize, 1<<30),
		"block out of bounds":   set32("large", offU, 1<<32-1),
		"block before metadata": set32("large", offU, 0),
		"compact inode":         set16("file", offFormat, 0),
		"layout":                set16("file", offFormat, 1|erofs.LayoutChunk<<1),
		"unknown format":        set16("file", offFormat, 1|1<<8),
		"xattrs out of bounds":  set16("white", offXattrs, 1<<16-1),
		"xattrs":                set16("file", offXattrs, 200),
		"shared xattrs":         func(f *forged) { i, _ := f.find(t, "xattr"); i[erofs.InodeSize+4] = 1 },
		"xattr prefix":          func(f *forged) { i, _ := f.find(t, "xattr"); i[erofs.InodeSize+12+1] = 5 },
		"xattr twice":           func(f *forged) { i, _ := f.find(t, "xattr"); i[erofs.InodeSize+12+4] = 'b' },
		"xattr cut off":         func(f *forged) { i, _ := f.find(t, "xattr"); i[erofs.InodeSize+12+2] = 200 },
		"mode":                  set16("file", offMode, 0o644),
		"size":                  set64("file", offSize, 6),
		"negative size":         set64("file", offSize, 1<<63),
		"reference of 2^62":     set64("ref", offSize, 1<<62),
		"reference of none":     set64("ref", offSize, 0),
		"reference to itself":   func(f *forged) { i, _ := f.find(t, "ref"); copy(i[strings.Index(string(i), "/2/01/1"):], "/1/01/1") },
		"reference to no file":  func(f *forged) { i, _ := f.find(t, "ref"); copy(i[strings.Index(string(i), "/2/01/1"):], "/../../") },
		"reference with data": func(f *forged) {
			i, _ := f.find(t, "ref")
			le.PutUint32(i[strings.Index(string(i), "\xff\xff\xff\xff"):], 1)
		},
		"inline, too large":    set64("small", offSize, InlineMax+1),
		"inline, empty":        set64("small", offSize, 0),
		"inline of 2^32":       set64("small", offSize, 1<<32+InlineMax),
		"inline, with a block": set32("small", offU, 1),
		"inline, plain":        set16("small", offFormat, 1|erofs.LayoutPlain<<1),
		"inline, a data file":  set16("file", offFormat, 1|erofs.LayoutInline<<1),
		"inline across a block": func(f *forged) {
			i, e := f.find(t, "small")
			nid := uint64(BlockSize/erofs.SlotSize - 3) // a slot before the end of the block is left for the bytes
			copy(f.inode(nid), i[:erofs.InodeSize])
			le.PutUint64(e, nid)
		},
		"number":                set32("file", offIno, 2),
		"number 0":              set32("file", offIno, 0),
		"unknown number":        set32("file", offIno, 1<<32-1),
		"block of the file":     set32("file", offU, 2),
		"time":                  set32("file", offNsec, 1e9),
		"links":                 set32("file", offNlink, 2),
		"no links":              set32("file", offNlink, 0),
		"long target":           set64("long", offSize, 4096),
		"no target":             set64("long", offSize, 0),
		"inodes":                func(f *forged) { le.PutUint64(f.b[erofs.SuperOffset+16:], 1<<60) },
		"root":                  func(f *forged) { le.PutUint16(f.b[erofs.SuperOffset+14:], 0) },
		"root is a file":        func(f *forged) { _, e := f.find(t, "file"); le.PutUint16(f.b[erofs.SuperOffset+14:], le.Uint16(e)) },
		"size in the index":     func(f *forged) { le.PutUint64(f.b[p.t.index()+8:], 1<<40) },
		"index out of order":    func(f *forged) { le.PutUint32(f.b[p.t.index():], 2) },
		"file in the metadata":  func(f *forged) { le.PutUint32(f.b[p.t.index()+indexEntry:], p.super.MetaBlock) },
		"not used in the index": func(f *forged) { clear(f.b[p.t.index():][:indexEntry]) },
	} {
		f := &forged{slices.Clone(good), int(p.t.meta)}
		forge(f)
		noError(t, os.WriteFile(path, reseal(f.b), 0o600))
		if _, err := load(t.Context(), path); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", what, err)
		} else if strings.Contains(err.Error(), "checksum") {
			t.Errorf("%s is not what was found: %v", what, err)
		}
	}
}
