// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// On kernels where overlayfs needs metacopy=on, an upper directory refers to the
// layers below in two ways: a changed file may have its attributes only, and a
// renamed lower directory only its new name. Both say by trusted.overlay.redirect
// where they were, as a path from the root of the overlay or as a name in the
// directory that their parent was; without it, a file is where it was.
// (Documentation/filesystems/overlayfs.rst, "Redirects", "Metadata only copy up".)

// dirBelow returns the lower directory that d stands over, nil if there is none.
func (s *scan) dirBelow(d *scanDir) []part {
	if d.attr.opaque {
		return nil
	}
	from, name := d.parent.below, d.node.Name
	if d.attr.redirect != "" {
		name = d.attr.redirect
	}
	_, parts := s.find(from, name)
	return parts
}

// find looks a redirect up: a path from the root if it begins with a slash, else
// from a directory. parts are those of a directory found.
func (s *scan) find(from []part, redirect string) (v *visible, parts []part) {
	parts = from
	if strings.HasPrefix(redirect, "/") {
		_, parts = s.below.root()
	}
	for name := range strings.SplitSeq(path.Clean(redirect), "/") {
		if name == "" {
			continue
		}
		found, below, ok := lookup(parts, name)
		if !ok {
			return nil, nil
		}
		v, parts = &found, below
	}
	return v, parts
}

// lower returns Data and Inline of a file without data: those of the lower file.
func (s *scan) lower(d *scanDir, l *later) (Inode, error) {
	at := l.redirect
	if at == "" {
		at = l.node.Name
	}
	if v, _ := s.find(d.below, at); v != nil && isRegular(v.inode.Mode) && v.inode.Size == l.node.Inode.Size {
		return Inode{Data: v.inode.Data, Inline: v.inode.Inline}, nil
	}
	// The redirect may also be that of a view, handed up by the kernel.
	if ref, err := ParseRedirect(l.redirect); err == nil && s.hasData(ref) {
		return Inode{Data: ref}, nil
	}
	return Inode{}, fmt.Errorf("%q has its data in the lower layers at %q, and no file with data is there: %w",
		"/"+d.path(l.node.Name), at, errdefs.ErrFailedPrecondition)
}

// hasData reports whether the chain below has a data file.
func (s *scan) hasData(ref Ref) bool {
	m := s.below.layer(ref.Layer)
	if m == nil {
		return false
	}
	index := s.indexes[ref.Layer]
	if index == nil {
		if s.indexes == nil {
			s.indexes = map[uint64]map[uint32]*Inode{}
		}
		index = m.dataFiles()
		s.indexes[ref.Layer] = index
	}
	return index[ref.Number] != nil
}

// graft puts into a renamed directory what it brings along from below: copies of
// the lower entries, merged with its own. It is opaque already, since nothing of
// what stands below at its new name shows.
func (s *scan) graft(d *scanDir) error {
	parts := append([]part{{dir: d.node, layer: s.layer}}, d.below...)
	g := &grafter{scan: s, dirs: []*graftDir{{node: d.node}}, copies: map[*Inode]*Inode{}}
	return merge(s.ctx, parts, g)
}

// grafter makes the merged children of a renamed directory.
type grafter struct {
	*scan
	dirs   []*graftDir
	copies map[*Inode]*Inode // of lower inodes that may have several names
}

type graftDir struct {
	node     *Node
	children []*Node
}

func (g *grafter) enter(v *visible) error {
	node := v.node
	if v.layer != g.layer {
		node = &Node{Name: v.node.Name, Inode: g.copy(v)}
	}
	top := g.dirs[len(g.dirs)-1]
	top.children = append(top.children, node)
	if v.node.Dir() {
		g.dirs = append(g.dirs, &graftDir{node: node})
	}
	return nil
}

func (g *grafter) leave() error {
	top := g.dirs[len(g.dirs)-1]
	top.node.Children, g.dirs = top.children, g.dirs[:len(g.dirs)-1]
	return nil
}

// copy is the inode of a lower entry at a new place.
func (g *grafter) copy(v *visible) *Inode {
	if c := g.copies[v.inode]; c != nil && !v.node.Dir() {
		c.Nlink++
		return c
	}
	c := *v.inode
	c.Opaque, c.Implied, c.Block, c.Sum, c.Nlink = false, false, 0, 0, 1
	if v.inode.Nlink != 1 && !v.node.Dir() {
		g.copies[v.inode] = &c
	}
	return &c
}
