// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// visible is a name that stands in the merged tree. It is valid during one call of the visitor.
type visible struct {
	rec   record // the name's own record
	ino   *inode // the attributes, behind a hard link those of its first name
	off   int    // offset of the record that holds them
	layer *layer
	path  []byte // relative to the root, empty for the root
}

// id is the same for names of one inode.
func (v *visible) id() uint64 { return nodeID(v.layer.index, v.off) }

func nodeID(layer, off int) uint64 { return uint64(layer)<<48 | uint64(off) }

// redirect appends the path of the data below a data root.
func (v *visible) redirect(b []byte) []byte { return appendRedirect(b, v.layer.id, v.ino, v.path) }

func appendRedirect(b []byte, layerID string, i *inode, path []byte) []byte {
	if i.redirect != nil {
		return append(b, i.redirect...)
	}
	b = append(b, '/')
	b = append(b, layerID...)
	b = append(b, '/')
	return append(b, path...)
}

// visitor is called for each visible name in path order; leave, if set, at the end of each directory entered.
type visitor struct {
	enter func(*visible) error
	leave func() error
}

// merge walks all layers at once. Each directory is a frame: the layers that take part in it, topmost first. Their
// readers stand at entries of that directory or have left it, so that only names need comparing; the state is the
// readers and one frame for each level.
//
// What overlayfs shows (ovl_lookup in fs/overlayfs/namei.c) is decided from the top: the first entry is the visible
// one, a whiteout makes the name invisible; below a directory further directories take part, until one is opaque or
// something else than a directory stands there.
func merge(ctx context.Context, layers []*layer, visit visitor) error {
	if len(layers) > 1<<15 {
		return fmt.Errorf("merge %d layers: the limit is %d: %w", len(layers), 1<<15, errdefs.ErrInvalidArgument)
	}
	var (
		v      visible
		link   record
		parts  []*layer // of all frames, one after the other
		frames []int    // where in parts each frame begins
		ends   []int    // length of the path of each frame
	)
	// top decides among the entries at one path; from holds the layers that have it, topmost first.
	enter := func(from []*layer) error {
		found, closed := false, false
		begin := len(parts)
		for _, l := range from {
			cur := &l.cur
			take := false
			if !closed {
				switch {
				case cur.isDir() && (!found || v.rec.isDir()):
					take = true
					closed = cur.is(flagOpaque)
				default:
					closed = true
				}
				if !found && !cur.is(flagWhiteout) {
					found = true
					v.rec, v.layer = *cur, l
				}
			}
			var err error
			if take {
				parts = append(parts, l)
				err = l.next()
			} else {
				err = l.skip()
			}
			if err != nil {
				return err
			}
		}
		if !found {
			return nil
		}
		if len(v.rec.name) > 0 {
			if len(v.path) > 0 {
				v.path = append(v.path, '/')
			}
			v.path = append(v.path, v.rec.name...)
		}
		v.ino, v.off = &v.rec.inode, v.rec.off
		if v.rec.is(flagLink) {
			if err := v.layer.at(v.rec.linkTo, &link); err != nil {
				return err
			}
			v.ino, v.off = &link.inode, link.off
		}
		dir := v.rec.isDir()
		if err := visit.enter(&v); err != nil {
			return err
		}
		if dir {
			frames = append(frames, begin)
			ends = append(ends, len(v.path))
		}
		return nil
	}

	from := make([]*layer, 0, len(layers))
	for i := len(layers) - 1; i >= 0; i-- {
		if err := layers[i].rewind(); err != nil {
			return err
		}
		from = append(from, layers[i])
	}
	if err := enter(from); err != nil {
		return err
	}
	for n := 0; len(frames) > 0; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		depth, begin := len(frames), frames[len(frames)-1]
		v.path = v.path[:ends[depth-1]]
		from = from[:0]
		for _, l := range parts[begin:] {
			if !l.ok || l.cur.depth != depth {
				continue
			}
			c := -1
			if len(from) > 0 {
				c = bytes.Compare(l.cur.name, from[0].cur.name)
			}
			if c < 0 {
				from = from[:0]
			}
			if c <= 0 {
				from = append(from, l)
			}
		}
		if len(from) == 0 {
			frames, ends, parts = frames[:depth-1], ends[:depth-1], parts[:begin]
			if visit.leave != nil {
				if err := visit.leave(); err != nil {
					return err
				}
			}
			continue
		}
		if err := enter(from); err != nil {
			return err
		}
	}
	return nil
}
