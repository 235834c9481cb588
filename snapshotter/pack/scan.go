// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// ScanStats sums up a directory that was scanned.
type ScanStats struct {
	Entries int64 // names of the layer, whiteouts and the root included
	Files   int64 // names of regular files
	Dirs    int64 // directories, the root included
	Inodes  int64 // distinct inodes on disk, the directory itself and whiteouts included
	// Bytes is the disk usage, 512 times st_blocks over the distinct inodes, as
	// continuity's fs.DiskUsage counts it.
	Bytes     int64
	DataBytes int64 // sum of the sizes of the files that have bytes of their own, inline or in a data file
}

// Scan reads the metadata of the layer in dir, an upper directory of overlayfs or
// what an applier wrote; nobody may write to it meanwhile. Whiteouts are char
// devices 0:0, or empty files with trusted.overlay.whiteout in a directory with
// trusted.overlay.opaque=x.
//
// Data files get their numbers in path order, by the first name of an inode;
// files[i] is the path, relative to dir, of number i+1. It may be longer than
// PATH_MAX: open it by [OpenBeneath]. Scanning a directory again that did not
// change gives the same numbers. Block and Sum of the inodes are not set.
//
// Files without data (metacopy) and renamed directories (redirect) are resolved
// against below, the chain that the upper directory was mounted on. The error is
// of class errdefs.ErrFailedPrecondition where below does not have what they need,
// and errdefs.ErrInvalidArgument for what a pack cannot hold.
func Scan(ctx context.Context, dir string, layer uint64, below Chain) (m *Meta, files []string, stats ScanStats, err error) {
	fail := func(err error) (*Meta, []string, ScanStats, error) {
		return nil, nil, ScanStats{}, fmt.Errorf("scan layer %d: %w", layer, err)
	}
	if below.layer(layer) != nil {
		return fail(fmt.Errorf("it is one of the layers below: %w", errdefs.ErrInvalidArgument))
	}
	root, walked, err := scanWalk(ctx, dir)
	if err != nil {
		return fail(err)
	}
	s := &scan{ctx: ctx, layer: layer, below: below, stats: walked.stats, seen: map[fileID]*Inode{}}
	if err := s.link(root, walked.lookups); err != nil {
		return fail(err)
	}
	for i := len(s.renamed) - 1; i >= 0; i-- { // what is in a directory comes before it
		if err := s.graft(s.renamed[i]); err != nil {
			return fail(err)
		}
	}
	m = &Meta{Layer: layer, Root: root.node}
	if err := s.number(m); err != nil {
		return fail(err)
	}
	return m, s.files, s.stats, nil
}

// fileID is st_dev and st_ino.
type fileID struct{ dev, ino uint64 }

// scan makes a layer of what the walk found.
type scan struct {
	ctx     context.Context
	layer   uint64
	below   Chain
	stats   ScanStats
	seen    map[fileID]*Inode // inodes with several names; nil while all names were whiteouts
	renamed []*scanDir        // directories with a redirect, in path order
	files   []string
	indexes map[uint64]map[uint32]*Inode // data files of layers below
}

// link goes through what needs a second look, in path order: names of one inode
// get one [Inode], and files without data their reference.
func (s *scan) link(root *scanDir, lookups bool) error {
	if lookups {
		if err := s.below.check(); err != nil {
			return fmt.Errorf("files or directories refer to lower layers, and there are none: %w", errdefs.ErrFailedPrecondition)
		}
		_, root.below = s.below.root()
	}
	type frame struct {
		dir  *scanDir
		next int
	}
	frames := []frame{{dir: root}}
	for n := 0; len(frames) > 0; n++ {
		if n%1024 == 0 && s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		f := &frames[len(frames)-1]
		if f.next == len(f.dir.later) {
			frames = frames[:len(frames)-1]
			continue
		}
		l := &f.dir.later[f.next]
		f.next++
		if l.sub == nil {
			if err := s.file(f.dir, l); err != nil {
				return err
			}
			continue
		}
		if l.sub.attr.redirect != "" {
			s.renamed = append(s.renamed, l.sub)
		}
		if lookups {
			l.sub.below = s.dirBelow(l.sub)
		}
		frames = append(frames, frame{dir: l.sub})
	}
	return nil
}

// file completes a name whose inode has further ones or no data of its own.
func (s *scan) file(d *scanDir, l *later) error {
	if l.multi {
		first, found := s.seen[l.id]
		if !found {
			s.stats.Inodes++
			s.stats.Bytes += l.blocks * 512
			s.seen[l.id] = nil
		}
		if l.node.Whiteout() {
			return nil
		}
		if first != nil {
			first.Nlink++
			l.node.Inode = first
			return nil
		}
		s.seen[l.id] = l.node.Inode
	}
	if !l.metacopy {
		return nil
	}
	lower, err := s.lower(d, l)
	l.node.Inode.Data, l.node.Inode.Inline = lower.Data, lower.Inline
	return err
}

// number gives the data files their numbers, and counts what is in the layer.
func (s *scan) number(m *Meta) error {
	type frame struct {
		dir  *Node
		next int
		path int // length of the path of the directory
	}
	s.stats.Entries, s.stats.Dirs = 1, 1
	counted := map[*Inode]bool{} // inline files with several names
	var path []byte
	frames := []frame{{dir: m.Root}}
	for n := 0; len(frames) > 0; n++ {
		if n%1024 == 0 && s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		f := &frames[len(frames)-1]
		if f.next == len(f.dir.Children) {
			frames = frames[:len(frames)-1]
			continue
		}
		node := f.dir.Children[f.next]
		f.next++
		s.stats.Entries++
		if path = path[:f.path]; len(path) > 0 {
			path = append(path, '/')
		}
		path = append(path, node.Name...)
		switch {
		case node.Whiteout():
		case node.Dir():
			s.stats.Dirs++
			frames = append(frames, frame{dir: node, path: len(path)})
		case isRegular(node.Inode.Mode):
			s.stats.Files++
			in := node.Inode
			if in.Inline != "" && !counted[in] {
				s.stats.DataBytes += in.Size
				if in.Nlink > 1 {
					counted[in] = true
				}
			}
			if in.HasData() && in.Data.Number == 0 {
				if m.Numbers == 1<<32-1 {
					return fmt.Errorf("it has more than 2^32 data files: %w", errdefs.ErrInvalidArgument)
				}
				m.Numbers++
				in.Data = Ref{Layer: s.layer, Number: m.Numbers}
				s.stats.DataBytes += in.Size
				s.files = append(s.files, string(path))
			}
		}
	}
	return nil
}
