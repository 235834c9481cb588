// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// parser reads the EROFS metadata of a pack. It accepts what metaWriter writes and trusts none of it: the checksum
// keeps accidents out, not somebody who computes it anew. Each inode is read once, and what inodes have in common
// (blocks of directories, for instance) is counted for each, so that time and memory are bounded by the size of the
// metadata. It reads the inodes of directories, those of what is in them, and the blocks of directories each in the
// order in which they stand. Errors have no class, but for those of reading.
type parser struct {
	dirs, inodes, blocks window

	start uint32 // the block at which the metadata begins
	layer uint64
	index Index

	budget int64    // bytes that inodes may still have
	seen   []uint32 // by nid: the inode was read. It is seenWhole, or an index in shared
	shared []shared // inodes with several names, from 1
	found  uint64   // inodes
	used   []uint64 // numbers that have an inode, a bit each
	files  uint32
	slab   []Inode
	names  map[string]string // of xattrs
	queue  []parsedDir
}

// shared is an inode with several names.
type shared struct {
	inode *Inode // nil is a whiteout
	left  uint32 // names that it is yet to have
}

const seenWhole = 1<<32 - 1

// parsedDir is a directory whose names are yet to be read.
type parsedDir struct {
	node   *Node
	nid    uint32
	parent uint32 // index in the queue
	depth  uint32
}

const slabSize = 512

// parse returns the metadata of a layer.
func (p *parser) parse(ctx context.Context, root uint16, inos uint64) (*Meta, error) {
	p.budget = p.inodes.size
	p.seen = make([]uint32, p.inodes.size/erofs.SlotSize)
	p.shared = make([]shared, 1)
	p.used = make([]uint64, p.index.Len()/64+1)
	p.names = map[string]string{}
	m := &Meta{Layer: p.layer, Root: new(Node), Numbers: p.index.Len()}
	if err := p.name(m.Root, uint64(root), erofs.FileType(unix.S_IFDIR), 0); err != nil {
		return nil, fmt.Errorf("root directory %w", err)
	}
	for i := 0; i < len(p.queue); i++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := p.readDir(uint32(i)); err != nil {
			return nil, fmt.Errorf("directory %q %w", p.path(uint32(i)), err)
		}
	}
	for _, s := range p.shared {
		if s.left > 0 {
			return nil, fmt.Errorf("an inode lacks %d of its names", s.left)
		}
	}
	if p.found != inos {
		return nil, fmt.Errorf("%d inodes are found, the superblock says %d", p.found, inos)
	}
	used := uint32(0)
	for n := range p.index.Len() {
		if _, ok := p.index.At(n + 1); ok {
			used++
		}
	}
	if used != p.files {
		return nil, fmt.Errorf("the index has %d files, %d of them have an inode", used, p.files)
	}
	return m, nil
}

// path is the path of a directory, for errors.
func (p *parser) path(i uint32) string {
	var parts []string
	for ; i > 0; i = p.queue[i].parent {
		parts = append(parts, p.queue[i].node.Name)
	}
	return joinPath(parts)
}

// take charges the budget.
func (p *parser) take(n uint64) error {
	if n > uint64(p.budget) {
		return errors.New("shares its bytes with others")
	}
	p.budget -= int64(n)
	return nil
}

// name completes a node whose directory entry says nid and typ; parent is the index of the directory in the queue.
func (p *parser) name(n *Node, nid uint64, typ byte, parent uint32) error {
	depth := uint32(0)
	if len(p.queue) > 0 {
		if depth = p.queue[parent].depth + 1; depth > depthMax {
			return fmt.Errorf("is deeper than %d directories", depthMax)
		}
	}
	if nid >= uint64(len(p.seen)) {
		return fmt.Errorf("has inode %d, which is out of bounds", nid)
	}
	if k := p.seen[nid]; k > 0 {
		return p.further(n, k, typ)
	}
	off := int64(nid) * erofs.SlotSize
	b, err := p.inodes.get(off, erofs.InodeSize)
	if err != nil {
		return err
	}
	raw, ok := erofs.ParseInode(b)
	if !ok || typ != erofs.FileType(raw.Mode) || raw.Nlink == 0 {
		return fmt.Errorf("has inode %d, which is of another type or form", nid)
	}
	if err := p.take(erofs.InodeSize + uint64(raw.XattrSize)); err != nil {
		return err
	}
	if n.Inode, err = p.inode(&raw, off+erofs.InodeSize); err != nil {
		return err
	}
	p.found++
	p.seen[nid] = seenWhole
	if typ == erofs.FileType(unix.S_IFDIR) {
		p.queue = append(p.queue, parsedDir{n, uint32(nid), parent, depth})
	} else if raw.Nlink > 1 {
		p.seen[nid] = uint32(len(p.shared))
		p.shared = append(p.shared, shared{n.Inode, raw.Nlink - 1})
	}
	return nil
}

// further completes a node whose inode was read for another name.
func (p *parser) further(n *Node, k uint32, typ byte) error {
	if k == seenWhole || p.shared[k].left == 0 {
		return errors.New("has an inode that has all its names")
	}
	p.shared[k].left--
	n.Inode = p.shared[k].inode
	mode := uint32(unix.S_IFCHR)
	if n.Inode != nil {
		mode = n.Inode.Mode
	}
	if typ != erofs.FileType(mode) {
		return errors.New("has an inode of another type")
	}
	return nil
}

// readDir reads the names of a directory.
func (p *parser) readDir(i uint32) error {
	d := p.queue[i]
	off := int64(d.nid) * erofs.SlotSize
	b, err := p.dirs.get(off, erofs.InodeSize)
	if err != nil {
		return err
	}
	raw, _ := erofs.ParseInode(b)
	t, err := p.tail(&raw, off+erofs.InodeSize+int64(raw.XattrSize))
	if err != nil {
		return err
	}
	total := 0
	err = p.eachBlock(&t, &p.dirs, func(b []byte) error {
		n, ok := erofs.CountDirents(b)
		if total += n; !ok {
			return errors.New("has a malformed block")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if total < 2 {
		return errors.New("lacks . or .. among its names")
	}
	nodes := make([]Node, total-2)
	d.node.Children = make([]*Node, 0, len(nodes))
	last, dots := "", 0
	add := func(nid uint64, typ byte, name string) bool {
		if name <= last {
			err = fmt.Errorf("has names out of order, %q behind %q", name, last)
			return false
		}
		last = name
		if name == "." || name == ".." {
			want := d.nid
			if dots++; name == ".." {
				want = p.queue[d.parent].nid
			}
			if nid != uint64(want) || typ != erofs.FileType(unix.S_IFDIR) {
				err = fmt.Errorf("has %q at inode %d, not %d", name, nid, want)
			}
			return err == nil
		}
		if len(d.node.Children) == len(nodes) {
			err = errors.New("lacks . or .. among its names")
			return false
		}
		n := &nodes[len(d.node.Children)]
		if n.Name = name; checkNodeName(name) != nil {
			err = fmt.Errorf("has the impossible name %q", name)
		} else if err = p.name(n, nid, typ, i); err != nil {
			err = fmt.Errorf("has %q, which %w", name, err)
		}
		d.node.Children = append(d.node.Children, n)
		return err == nil
	}
	readErr := p.eachBlock(&t, &p.dirs, func(b []byte) error {
		if !erofs.ParseDirents(b, add) && err == nil {
			err = errors.New("has a malformed block")
		}
		return err
	})
	if readErr != nil {
		return readErr
	}
	if dots != 2 {
		return errors.New("lacks . or .. among its names")
	}
	if len(nodes) == 0 {
		d.node.Children = nil
	}
	return nil
}
