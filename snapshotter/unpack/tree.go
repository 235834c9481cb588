// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"cmp"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// manyChildren is the number of children from which a directory has a map of
// them. Smaller ones are sorted all the time.
const manyChildren = 64

// tree is the layer as it would stand in an upper directory. Children of
// directories in maps are valid only after finish.
type tree struct {
	root *pack.Node
	maps map[*pack.Node]map[string]*pack.Node
	// What a layer has a million of is made in pieces: fewer objects to make and to look at.
	nodes   slab[pack.Node]
	inodes  slab[pack.Inode]
	text    text
	removed int // how often something was removed
	// steps is how far lstat has walked altogether, see maxSteps.
	steps int64
	// dropped is told of each regular file with data that has lost its last name.
	dropped func(*pack.Inode)
}

func newTree(dropped func(*pack.Inode)) *tree {
	// A layer cannot list its root: containerd ignores such an entry.
	root := &pack.Node{Inode: &pack.Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 1, Implied: true}}
	return &tree{root: root, maps: map[*pack.Node]map[string]*pack.Node{}, dropped: dropped}
}

func byName(n *pack.Node, name string) int { return strings.Compare(n.Name, name) }

// find returns where the child of that name is or belongs. Most names come in order.
func find(dir *pack.Node, name string) (i int, ok bool) {
	if n := len(dir.Children); n == 0 || dir.Children[n-1].Name < name {
		return n, false
	}
	return slices.BinarySearchFunc(dir.Children, name, byName)
}

// child returns the child of that name, or nil.
func (t *tree) child(dir *pack.Node, name string) *pack.Node {
	if len(dir.Children) == 0 {
		return t.maps[dir][name]
	}
	if i, ok := find(dir, name); ok {
		return dir.Children[i]
	}
	return nil
}

// add gives dir a child. There must be none of that name.
func (t *tree) add(dir, n *pack.Node) {
	if n.Inode != nil {
		n.Inode.Nlink++
	}
	if len(dir.Children) == 0 {
		if m := t.maps[dir]; m != nil {
			m[n.Name] = n
			return
		}
	}
	i, _ := find(dir, n.Name)
	dir.Children = slices.Insert(dir.Children, i, n)
	if len(dir.Children) >= manyChildren {
		m := make(map[string]*pack.Node, 2*manyChildren)
		for _, c := range dir.Children {
			m[c.Name] = c
		}
		t.maps[dir], dir.Children = m, nil
	}
}

// remove removes n, a child of dir, with all below it.
func (t *tree) remove(dir, n *pack.Node) {
	t.removed++
	if m := t.maps[dir]; m != nil {
		delete(m, n.Name)
	} else if i, ok := find(dir, n.Name); ok {
		dir.Children = slices.Delete(dir.Children, i, i+1)
	}
	t.unlink(n)
}

// unlink takes the names of n and of all below it from their inodes.
func (t *tree) unlink(n *pack.Node) {
	if n.Inode == nil {
		return
	}
	for _, c := range n.Children {
		t.unlink(c)
	}
	for _, c := range t.maps[n] {
		t.unlink(c)
	}
	delete(t.maps, n)
	if n.Inode.Nlink--; n.Inode.Nlink == 0 && n.Inode.HasData() {
		t.dropped(n.Inode)
	}
}

// finish sorts what is in maps. The tree does not change after it.
func (t *tree) finish() *pack.Node {
	for dir, m := range t.maps {
		dir.Children = make([]*pack.Node, 0, len(m))
		for _, n := range m {
			dir.Children = append(dir.Children, n)
		}
		slices.SortFunc(dir.Children, func(a, b *pack.Node) int { return cmp.Compare(a.Name, b.Name) })
		delete(t.maps, dir)
	}
	return t.root
}

// slab makes values in pieces. What one value holds lives as long as its piece does.
type slab[T any] struct{ free []T }

const slabSize = 64

func (s *slab[T]) take() *T {
	if len(s.free) == 0 {
		s.free = make([]T, slabSize)
	}
	v := &s.free[0]
	s.free = s.free[1:]
	return v
}

// text keeps strings in pieces.
type text struct{ free []byte }

const (
	textSize  = 16 << 10
	textShare = 1 << 10 // longer strings stand alone
)

func (t *text) clone(s string) string {
	return t.cloneBytes(unsafe.Slice(unsafe.StringData(s), len(s)))
}

// cloneBytes returns b as a string. Its bytes are written once and never again.
func (t *text) cloneBytes(b []byte) string {
	switch {
	case len(b) <= 1 || len(b) > textShare: // the runtime has strings of one byte
		return string(b)
	case len(b) > len(t.free):
		t.free = make([]byte, textSize)
	}
	n := copy(t.free, b)
	s := unsafe.String(&t.free[0], n)
	t.free = t.free[n:]
	return s
}
