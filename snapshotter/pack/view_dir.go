// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// endDir returns the bytes of a directory all names of which are known.
func endDir(names *erofs.DirNames, size *erofs.DirLayout) (uint32, error) {
	names.End()
	if size.Size() >= 1<<32 {
		return 0, fmt.Errorf("a directory needs %d bytes, the limit is 2^32: %w", size.Size(), errdefs.ErrInvalidArgument)
	}
	return uint32(size.Size()), nil
}

// dirBlocks makes the blocks of one directory after the other.
type dirBlocks struct {
	b            []byte
	self, parent uint64 // nids
	first, end   int    // blocks that are wanted
	entries      []erofs.Dirent
	layout       erofs.DirLayout
	names        erofs.DirNames
	nid          uint64 // of the name that comes next
	typ          byte
}

// begin begins a directory, of which finish appends to b the blocks from first up
// to, not including, end.
func (d *dirBlocks) begin(b []byte, self, parent uint64, first, end int) *dirBlocks {
	if d.names.Add == nil {
		d.names.Add = d.place
	}
	d.b, d.self, d.parent, d.first, d.end = b, self, parent, first, end
	d.layout, d.names.Dots = erofs.DirLayout{}, 0
	return d
}

// add takes the next name in byte order. The name must stay as it is until finish.
func (d *dirBlocks) add(name []byte, nid uint64, typ byte) {
	d.nid, d.typ = nid, typ
	d.names.Name(name)
}

func (d *dirBlocks) place(name []byte, dot int) {
	if d.layout.Add(len(name)) {
		d.flush(d.layout.Blocks-1, true)
	}
	e := erofs.Dirent{Nid: d.nid, Type: d.typ, Name: name}
	switch dot {
	case 1:
		e.Nid, e.Type = d.self, typeDir
	case 2:
		e.Nid, e.Type = d.parent, typeDir
	}
	d.entries = append(d.entries, e)
}

func (d *dirBlocks) flush(block int, full bool) {
	if block >= d.first && block < d.end {
		d.b = erofs.AppendDirBlock(d.b, d.entries, full)
	}
	d.entries = d.entries[:0]
}

func (d *dirBlocks) finish() []byte {
	d.names.End()
	d.flush(d.layout.Blocks, false)
	return d.b
}
