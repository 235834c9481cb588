// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// On kernels where overlayfs needs metacopy=on, an upper directory refers to the layers below in two ways: a changed
// file may have its attributes only, and a renamed lower directory only its new name. Both say by
// trusted.overlay.redirect where they were, as a path from the root of the overlay or as a name in the directory
// that their parent was; without it, a file is where it was. Documentation/filesystems/overlayfs.rst, "Redirects" and
// "Metadata only copy up".

// lower is what a layer needs of the merged tree below it: files by path, and directories with all that is in them.
type lower struct {
	entries map[string]*lowerEntry // by path, "/" is the root
	layers  map[string]bool        // ids of the chain
}

type lowerEntry struct {
	Entry
	children []*lowerEntry // in order
}

// origin returns the path in the layers below where the content of d comes from; ok is false if there is none.
func (d *dir) origin() (p string, ok bool) {
	switch {
	case d.parent == nil:
		return "/", true
	case d.attr.opaque:
		return "", false
	case strings.HasPrefix(d.attr.redirect, "/"):
		return path.Clean(d.attr.redirect), true
	}
	parent, ok := d.parent.origin()
	if d.attr.redirect != "" {
		return path.Join(parent, d.attr.redirect), ok
	}
	return path.Join(parent, d.name), ok
}

// fileOrigin does the same for a file in d.
func (d *dir) fileOrigin(l *late) (p string, ok bool) {
	if strings.HasPrefix(l.redirect, "/") {
		return path.Clean(l.redirect), true
	}
	parent, ok := d.origin()
	if l.redirect != "" {
		return path.Join(parent, l.redirect), ok
	}
	return path.Join(parent, l.name), ok
}

// findLower collects in one pass over the chain what the directories below root refer to.
func findLower(ctx context.Context, chain Chain, root *dir) (*lower, error) {
	lo := &lower{entries: map[string]*lowerEntry{}, layers: map[string]bool{}}
	files, dirs := map[string]bool{}, map[string]bool{}
	var collect func(d *dir)
	collect = func(d *dir) {
		if d.attr.redirect != "" {
			if p, ok := d.origin(); ok {
				dirs[p] = true
			}
		}
		for _, c := range d.cuts {
			switch {
			case c.child != nil:
				collect(c.child)
			case c.late.metacopy:
				if p, ok := d.fileOrigin(c.late); ok {
					files[p] = true
				}
			}
		}
	}
	collect(root)
	if len(chain) == 0 {
		return nil, fmt.Errorf("files or directories refer to lower layers, and there are none: %w", errdefs.ErrFailedPrecondition)
	}
	var stack []*lowerEntry
	for e, err := range chain.Entries(ctx) {
		if err != nil {
			return nil, err
		}
		lo.layers[e.Layer] = true
		for len(stack) > 0 && !below(e.Path, stack[len(stack)-1].Path) {
			stack = stack[:len(stack)-1]
		}
		if len(stack) == 0 && !dirs[e.Path] && !files[e.Path] {
			continue
		}
		le := &lowerEntry{Entry: e}
		lo.entries[e.Path] = le
		if len(stack) > 0 {
			top := stack[len(stack)-1]
			top.children = append(top.children, le)
		}
		if isDir(e.Mode) && (len(stack) > 0 || dirs[e.Path]) {
			stack = append(stack, le)
		}
	}
	return lo, nil
}

// below tells whether path p is inside directory dir.
func below(p, dir string) bool {
	if dir == "/" {
		return p != "/"
	}
	return len(p) > len(dir) && p[len(dir)] == '/' && p[:len(dir)] == dir
}

// dirOf returns the directory that d merges with, or nil.
func (lo *lower) dirOf(d *dir) *lowerEntry {
	p, ok := d.origin()
	if e := lo.entries[p]; ok && e != nil && isDir(e.Mode) {
		return e
	}
	return nil
}

// fileOf returns the redirect of the file that has the data of l.
func (lo *lower) fileOf(d *dir, l *late) ([]byte, error) {
	p, ok := d.fileOrigin(l)
	if e := lo.entries[p]; ok && e != nil && e.Redirect != "" {
		return []byte(e.Redirect), nil
	}
	// The redirect may also be one of ours, handed up from the tree.
	if layer, _, _ := strings.Cut(strings.TrimPrefix(l.redirect, "/"), "/"); l.redirect != "" && lo.layers[layer] && cleanRedirect([]byte(l.redirect)) {
		return []byte(l.redirect), nil
	}
	return nil, fmt.Errorf("%q has its data in the lower layers at %q, and no file with data is there: %w",
		path.Join("/", d.path, l.name), p, errdefs.ErrFailedPrecondition)
}

// merged writes the entries of a directory that stands over a lower one elsewhere: both together, as copies.
func (c *capture) merged(d *dir, lower *lowerEntry) {
	var below []*lowerEntry
	if lower != nil {
		below = lower.children
	}
	takeBelow := func(name string, all bool) {
		for len(below) > 0 && (all || base(below[0]) < name) {
			c.copy(below[0], d.depth+1, path.Join(d.path, base(below[0])))
			below = below[1:]
		}
	}
	each(d, func(rec *record, raw []byte, cut *cut) {
		var name string
		if rec != nil {
			name = string(rec.name)
		} else {
			name = cut.late.name
		}
		takeBelow(name, false)
		if len(below) > 0 && base(below[0]) == name {
			below = below[1:] // hidden, or taken up by the directory of that name
		}
		switch {
		case rec == nil:
			c.late(d, cut.late)
		case rec.is(flagWhiteout):
			c.stats.Entries--
			if cut != nil {
				c.late(d, cut.late)
			}
		default:
			c.buf = append(c.buf, raw...)
		}
		if cut != nil && cut.child != nil {
			if e := c.lower.dirOf(cut.child); e != nil && !cut.child.attr.opaque {
				c.merged(cut.child, e)
			} else {
				c.child(cut.child)
			}
		}
	})
	takeBelow("", true)
}

func base(e *lowerEntry) string { return e.Path[strings.LastIndexByte(e.Path, '/')+1:] }

// each calls f for each entry of d: with its record and its bytes, or, if it has to wait, with the cut only.
func each(d *dir, f func(rec *record, raw []byte, cut *cut)) {
	r := reader{data: d.buf}
	cuts := d.cuts
	for {
		if len(cuts) > 0 && cuts[0].off == r.pos && cuts[0].late != nil && !cuts[0].late.whiteout {
			f(nil, nil, &cuts[0])
			cuts = cuts[1:]
			continue
		}
		if r.pos == len(r.data) {
			return
		}
		var rec record
		begin := r.pos
		if r.record(&rec) != nil {
			return
		}
		var at *cut
		if len(cuts) > 0 && cuts[0].off == r.pos && (cuts[0].child != nil || cuts[0].late.whiteout) {
			at, cuts = &cuts[0], cuts[1:]
		}
		f(&rec, d.buf[begin:r.pos], at)
	}
}

// copy writes a lower entry and everything below it at a new place.
func (c *capture) copy(e *lowerEntry, depth int, at string) {
	if c.err != nil {
		return
	}
	if len(at)+1 > maxPath {
		c.err = fmt.Errorf("%q: the path is longer than %d bytes: %w", at, maxPath, errdefs.ErrInvalidArgument)
		return
	}
	c.stats.Entries++
	name := at[strings.LastIndexByte(at, '/')+1:]
	i := inode{
		mode: e.Mode, uid: e.UID, gid: e.GID, sec: e.Sec, nsec: e.Nsec, rdev: e.Rdev, multi: e.Nlink > 1,
		target: []byte(e.Target),
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		c.stats.Files++
		i.size = uint64(e.Size)
	case unix.S_IFDIR:
		c.stats.Dirs++
	}
	if e.Redirect != "" {
		i.redirect = []byte(e.Redirect)
	}
	names := make([]string, 0, len(e.Xattrs))
	for attr := range e.Xattrs {
		names = append(names, attr)
	}
	slices.Sort(names)
	for _, attr := range names {
		i.xattrs = appendString(appendString(i.xattrs, attr), e.Xattrs[attr])
	}
	if i.multi && c.link(depth, fileID{1<<64 - 1, e.Inode}, name) {
		return
	}
	c.buf = appendInode(appendName(c.buf, depth, inodeFlags(&i), name), &i)
	for _, child := range e.children {
		c.copy(child, depth+1, path.Join(at, base(child)))
	}
	if len(c.buf) > 1<<20 {
		c.flush()
	}
}
