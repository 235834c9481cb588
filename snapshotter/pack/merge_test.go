// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestViewRoundTrip compares random chains: overlayfs over the layers themselves, and
// the view over packs and NVM.
func TestViewRoundTrip(t *testing.T) {
	asRoot(t)
	seeded(t, func(t *testing.T, g *gen) {
		nvm := newNVM(t)
		var layers []*testLayer
		var dirs []string
		for i := range 1 + g.IntN(6) {
			dir := t.TempDir()
			g.layer(dir)
			l, _ := store(t, dir, uint64(100+i), nil, nvm, func() bool { return g.IntN(3) == 0 })
			layers, dirs = append(layers, l), append(dirs, dir)
		}
		want := list(t, overlayLayers(t, dirs))
		image, s := writeTo(t, layers)
		view := mountView(t, image, s.Devices, layers, g.IntN(3) == 0)
		same(t, "view", want, listView(t, mountContainer(t, view, nvm)))
	})
}

// TestManyLayers: as many as an image may have.
func TestManyLayers(t *testing.T) {
	asRoot(t)
	g := &gen{Rand: newRand(1), t: t, below: map[string]bool{}, depth: 1}
	nvm := newNVM(t)
	var layers []*testLayer
	var dirs []string
	for i := range 127 {
		dir := t.TempDir()
		g.layer(dir)
		noError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("only-in-", i)), bytes.Repeat([]byte("x"), InlineMax+1), 0o644))
		l, _ := store(t, dir, uint64(1000-i), nil, nvm, func() bool { return g.IntN(2) == 0 })
		layers, dirs = append(layers, l), append(dirs, dir)
	}
	image, s := writeTo(t, layers)
	if len(s.Devices) != len(layers) || s.Devices[0] != 1000 {
		t.Errorf("devices are %d", s.Devices)
	}
	view := mountView(t, image, s.Devices, layers, false)
	same(t, "127 layers", list(t, overlayLayers(t, dirs)), listView(t, mountContainer(t, view, nvm)))
}

// tree makes metadata of lines "path mark": a directory ends with a slash; marks are
// opaque, implied, whiteout, and data. Lines are in path order.
func tree(layer uint64, lines ...string) *Meta {
	m := &Meta{Layer: layer, Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 1}}}
	nodes := map[string]*Node{"": m.Root}
	for _, line := range lines {
		name, mark, _ := strings.Cut(line, " ")
		path, dir := strings.CutSuffix(name, "/")
		n := nodes[path]
		if n == nil {
			parent, base := "", path
			if i := strings.LastIndexByte(path, '/'); i >= 0 {
				parent, base = path[:i], path[i+1:]
			}
			n = &Node{Name: base}
			nodes[path] = n
			nodes[parent].Children = append(nodes[parent].Children, n)
		}
		if mark == "whiteout" {
			continue
		}
		n.Inode = &Inode{Mode: unix.S_IFREG | 0o644, Nlink: 1, Sec: int64(layer), UID: uint32(layer)}
		switch {
		case dir:
			n.Inode.Mode = unix.S_IFDIR | 0o700
			n.Inode.Opaque, n.Inode.Implied = strings.Contains(mark, "opaque"), strings.Contains(mark, "implied")
		case mark == "data":
			m.Numbers++
			n.Inode.Size, n.Inode.Data, n.Inode.Block = 1, Ref{layer, m.Numbers}, m.Numbers
		}
	}
	return m
}

// TestMerge is what each kind of entry does to those below it.
func TestMerge(t *testing.T) {
	base := tree(1, "a/", "a/b/", "a/b/c", "a/d", "e", "f/", "f/g")
	for _, test := range []struct {
		name   string
		layers []*Meta
		want   string // path, and the layer whose attributes it has
	}{
		{"alone", nil, "/:0 /a:1 /a/b:1 /a/b/c:1 /a/d:1 /e:1 /f:1 /f/g:1"},
		{"whiteouts", []*Meta{tree(2, "a/", "a/b whiteout", "e whiteout", "x whiteout")}, "/:0 /a:2 /a/d:1 /f:1 /f/g:1"},
		{"a whiteout of a directory", []*Meta{tree(2, "a whiteout"), tree(3, "a/", "a/n")}, "/:0 /a:3 /a/n:3 /e:1 /f:1 /f/g:1"},
		{"opaque", []*Meta{tree(2, "a/ opaque", "a/n"), tree(3, "a/", "a/b/", "a/b/x")}, "/:0 /a:3 /a/b:3 /a/b/x:3 /a/n:2 /e:1 /f:1 /f/g:1"},
		{"a file over a directory", []*Meta{tree(2, "a", "f/", "f/g/", "f/g/h")}, "/:0 /a:2 /e:1 /f:2 /f/g:2 /f/g/h:2"},
		{"a directory over a file over one", []*Meta{tree(2, "a"), tree(3, "a/", "a/z")}, "/:0 /a:3 /a/z:3 /e:1 /f:1 /f/g:1"},
		{"an opaque root", []*Meta{tree(2, "/ opaque", "n")}, "/:2 /n:2"},
		{"order around dots", []*Meta{tree(2, "/ opaque", "+", "-/", "-/x", ".a", "..b", "a")}, "out of order"},
		// Implied directories: containerd's applier copies from the directory below.
		{"implied", []*Meta{tree(2, "a/ implied", "a/b/ implied", "a/b/x", "n/ implied", "n/y")}, "/:0 /a:1 /a/b:1 /a/b/c:1 /a/b/x:2 /a/d:1 /e:1 /f:1 /f/g:1 /n:0 /n/y:2"},
		{"implied over implied", []*Meta{tree(2, "a/ implied"), tree(3, "a/ implied", "a/x")}, "/:0 /a:1 /a/b:1 /a/b/c:1 /a/d:1 /a/x:3 /e:1 /f:1 /f/g:1"},
		{"explicit over implied", []*Meta{tree(2, "a/ implied"), tree(3, "a/")}, "/:0 /a:3 /a/b:1 /a/b/c:1 /a/d:1 /e:1 /f:1 /f/g:1"},
		{"implied over a file", []*Meta{tree(2, "e/ implied", "e/x")}, "/:0 /a:1 /a/b:1 /a/b/c:1 /a/d:1 /e:0 /e/x:2 /f:1 /f/g:1"},
		{"implied over a whiteout", []*Meta{tree(2, "a whiteout"), tree(3, "a/ implied", "a/x")}, "/:0 /a:0 /a/x:3 /e:1 /f:1 /f/g:1"},
		{"implied and opaque", []*Meta{tree(2, "a/ implied opaque", "a/x")}, "/:0 /a:1 /a/x:2 /e:1 /f:1 /f/g:1"},
		{"implied below opaque", []*Meta{tree(2, "a/ opaque", "a/b/ implied", "a/b/x")}, "/:0 /a:2 /a/b:1 /a/b/x:2 /e:1 /f:1 /f/g:1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := append(Chain{base}, test.layers...)
			var got []string
			for e, err := range c.Entries(t.Context()) {
				if err != nil {
					if test.want != "out of order" || !errdefs.IsInvalidArgument(err) {
						t.Fatal(err)
					}
					return
				}
				got = append(got, fmt.Sprintf("%s:%d", e.Path, e.UID))
			}
			if g := strings.Join(got, " "); g != test.want {
				t.Errorf("got  %s\nwant %s", g, test.want)
			}
			writeTo(t, synthetic(t, c...))
		})
	}
}

// TestImpliedAttributes: what a directory gets that nobody below has.
func TestImpliedAttributes(t *testing.T) {
	m := tree(7, "a/ implied", "a/x")
	m.Root.Children[0].Inode.Xattrs = []Xattr{{"user.x", "y"}}
	for e, err := range (Chain{m}).Entries(t.Context()) {
		noError(t, err)
		if e.Path == "/a" && (e.Mode != unix.S_IFDIR|0o755 || e.UID != 0 || e.Sec != 7 || e.Xattrs != nil || e.Implied) {
			t.Errorf("implied directory is %+v", *e.Inode)
		}
	}
}

// TestChainRefuses: what cannot be merged is an error with its class.
func TestChainRefuses(t *testing.T) {
	name := func(names ...string) *Meta {
		m := tree(1)
		for _, n := range names {
			m.Root.Children = append(m.Root.Children, &Node{Name: n, Inode: &Inode{Mode: unix.S_IFREG}})
		}
		return m
	}
	inode := func(i Inode) *Meta { m := name("a"); m.Root.Children[0].Inode = &i; return m }
	file := Inode{Mode: unix.S_IFREG, Size: 1, Data: Ref{1, 1}, Block: 1}
	with := func(f func(i *Inode)) *Meta { i := file; f(&i); return inode(i) }
	for what, c := range map[string]Chain{
		"no layers":            nil,
		"a layer twice":        {tree(1), tree(1)},
		"no root":              {{Layer: 1}},
		"a file as root":       {{Layer: 1, Root: &Node{Inode: &Inode{Mode: unix.S_IFREG}}}},
		"wrong order":          {name("b", "a")},
		"a name twice":         {name("a", "a")},
		"an empty name":        {name("")},
		"a dot":                {name(".")},
		"two dots":             {name("..")},
		"a slash":              {name("a/b")},
		"a zero byte":          {name("a\x00")},
		"a long name":          {name(strings.Repeat("n", 256))},
		"an unknown type":      {inode(Inode{Mode: 0o644})},
		"a negative size":      {with(func(i *Inode) { i.Size = -1 })},
		"no data":              {with(func(i *Inode) { i.Data = Ref{} })},
		"no block":             {with(func(i *Inode) { i.Block = 0 })},
		"beyond its pack":      {with(func(i *Inode) { i.Size = 8*BlockSize + 1 })},
		"an empty symlink":     {inode(Inode{Mode: unix.S_IFLNK})},
		"a long symlink":       {inode(Inode{Mode: unix.S_IFLNK, Inline: strings.Repeat("x", 4096)})},
		"an impossible device": {inode(Inode{Mode: unix.S_IFBLK, Rdev: 1 << 62})},
		"a long value":         {inode(Inode{Mode: unix.S_IFREG, Xattrs: []Xattr{{"user.x", strings.Repeat("v", 1<<16)}}})},
	} {
		if _, err := WriteView(t.Context(), c, map[uint64]uint32{1: 9}, io.Discard); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	good := Chain{inode(file)}
	if _, err := WriteView(t.Context(), good, map[uint64]uint32{1: 2}, io.Discard); err != nil {
		t.Errorf("right: %v", err)
	}
	if _, err := WriteView(t.Context(), good, nil, io.Discard); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no size of the pack: %v", err)
	}
	for what, ref := range map[string]Ref{"a foreign layer": {9, 1}, "a missing number": {1, 2}} {
		top := tree(2, "b")
		top.Root.Children[0].Inode = &Inode{Mode: unix.S_IFREG, Size: 1, Data: ref}
		if _, err := WriteView(t.Context(), append(good, top), map[uint64]uint32{1: 9}, io.Discard); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a reference to %s: %v", what, err)
		}
	}
	if _, err := WriteView(t.Context(), good, map[uint64]uint32{1: 9}, failing{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := WriteView(ctx, good, map[uint64]uint32{1: 9}, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// failing is a file on a full disk.
type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// TestNumberKey: files are in the order of their directories.
func TestNumberKey(t *testing.T) {
	numbers := []uint32{1, 2, 9, 10, 11, 99, 100, 101, 255, 256, 257, 512, 513, 1025, 2561, 25601, 25857, 1<<32 - 1, 1<<32 - 256, 429496729, 4294967041}
	slices.SortFunc(numbers, func(a, b uint32) int {
		return strings.Compare(Ref{1, a}.Redirect(), Ref{1, b}.Redirect())
	})
	if !slices.IsSortedFunc(numbers, func(a, b uint32) int {
		if numberKey(a) < numberKey(b) {
			return -1
		}
		return 1
	}) {
		t.Errorf("the keys of %d are out of order", numbers)
	}
}
