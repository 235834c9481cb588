// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// fuzzChain makes layers of arbitrary bytes: each says what kind of name comes
// next, and the next ones its name. Little of it need make sense.
func fuzzChain(data []byte) (c Chain) {
	next := func() byte {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return b
	}
	for layer := range uint64(1 + next()%3) {
		m := &Meta{Layer: layer, Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}, Numbers: 300}
		inodes := []*Inode{{Mode: unix.S_IFIFO, Nlink: 2}}
		stack := []*Node{m.Root}
		for range next() {
			top := stack[len(stack)-1]
			kind := next()
			n := &Node{Name: string(data[:min(len(data), int(kind>>4))])}
			data = data[len(n.Name):]
			if kind&0xf != 0 { // 0 is a whiteout
				n.Inode = &Inode{Mode: unix.S_IFREG, Nlink: 1}
			}
			switch kind & 0xf {
			case 1, 2, 3:
				n.Inode.Mode, n.Inode.Opaque, n.Inode.Implied = unix.S_IFDIR, kind&2 != 0, next()&1 != 0
				stack = append(stack, n)
			case 4, 5:
				n.Inode.Size, n.Inode.Block, n.Inode.Data = int64(next()), 1+uint32(next()), Ref{layer, 1 + uint32(next())}
			case 6:
				n.Inode.Size, n.Inode.Data = int64(next()), Ref{uint64(next() % 3), uint32(next())}
			case 7:
				n.Inode = inodes[int(next())%len(inodes)]
			case 8:
				n.Inode.Mode, n.Inode.Inline = unix.S_IFLNK, strings.Repeat("t", 20*int(next()))
			case 9:
				n.Inode.Mode = uint32(next()) << 8
			case 10:
				n.Inode.Xattrs = []Xattr{{"user." + string(rune(next())), strings.Repeat("v", 300*int(next()))}}
			case 11, 12:
				n.Inode.Nlink = 2
				inodes = append(inodes, n.Inode)
			case 13:
				stack = stack[:max(1, len(stack)-1)]
				continue
			}
			top.Children = append(top.Children, n)
		}
		c = append(c, m)
	}
	return c
}

// FuzzView merges and writes arbitrary metadata: the view is right, or it is
// refused.
func FuzzView(f *testing.F) {
	f.Add([]byte{1, 4, 0x11, 'a', 0, 0x14, 'b', 5, 1, 1, 0x1d, 0x17, 'c', 0, 3, 0x10, 'a', 0x16, 'd', 5, 0, 1, 0x1b, 'e'})
	f.Add([]byte{2, 3, 0x11, 'a', 1, 0x14, 'b', 5, 1, 1, 0x1d, 2, 0x12, 'a', 1, 0x18, 'c', 200, 1, 0x11, 'a', 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		c := fuzzChain(data)
		blocks := map[uint64]uint32{0: 1000, 1: 1000, 2: 1000}
		var image bytes.Buffer
		s, err := WriteView(t.Context(), c, blocks, &image)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Fatal(err)
			}
			return
		}
		entries, last := int64(0), ""
		for e, err := range c.Entries(t.Context()) {
			noError(t, err)
			// Of paths, with a separator before all other bytes, the order is that of strings.
			path := strings.ReplaceAll(strings.TrimSuffix(e.Path, "/"), "/", "\x00")
			if entries++; entries > 1 && path <= last {
				t.Fatalf("%q comes after %q", path, last)
			}
			last = path
		}
		if s.Entries != entries || s.Bytes != int64(image.Len()) {
			t.Fatalf("%+v, want %d entries in %d bytes", s, entries, image.Len())
		}
		img, err := erofs.Open(bytes.NewReader(image.Bytes()), erofs.WithExtraDevices(make([]io.ReaderAt, len(s.Devices))...))
		noError(t, err)
		seen, files := int64(0), int64(0)
		for dir, count := range map[string]*int64{"t": &seen, "h": &files} {
			noError(t, fs.WalkDir(img, dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil && (dir == "t" || !d.IsDir()) {
					*count++
				}
				return err
			}))
		}
		if seen != entries || files != s.Files {
			t.Fatalf("go-erofs finds %d entries and %d data files, want %d and %d", seen, files, entries, s.Files)
		}
	})
}

// FuzzVerifyView gives arbitrary bytes as a file.
func FuzzVerifyView(f *testing.F) {
	var b bytes.Buffer
	_, err := WriteView(f.Context(), Chain{tree(1, "a data")}, map[uint64]uint32{1: 2}, &b)
	noError(f, err)
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:5000])
	f.Fuzz(func(t *testing.T, data []byte) {
		name := filepath.Join(t.TempDir(), "img")
		noError(t, os.WriteFile(name, data, 0o600))
		if err := VerifyViewDeep(name); (err == nil) != bytes.Equal(data, b.Bytes()) {
			t.Fatalf("%d bytes: %v", len(data), err)
		}
		if _, err := ViewDevices(name); VerifyView(name) != nil && err == nil {
			t.Fatal("devices of what is no view")
		}
	})
}
