// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// node is what the writer keeps of a visible name; the rest is read again from the capture in memory.
type node struct {
	rec   uint64 // of the name's own record, as nodeID
	nid   uint32
	next  uint32 // next name in the same directory, 0 at the end
	child uint32 // directories: first name, 0 if empty. Further names of an inode: the node of its first name
	xsize uint32 // xattrs
	tail  uint32 // chunk indexes, symlink target, or entries of a directory
	block uint32 // first data block, counted from the first of all, if plain blocks are used
	depth uint16
	typ   byte
	alias bool // a further name of an inode
}

// split tells how much of size stands in data blocks and how much behind the inode.
func split(size uint64) (blocks uint32, inline int) {
	if t := size % erofs.BlockSize; t <= erofs.TailMax {
		return uint32(size / erofs.BlockSize), int(t)
	}
	return uint32(size/erofs.BlockSize) + 1, 0
}

type writer struct {
	ctx    context.Context
	layers []*layer
	nodes  []node
	links  map[uint64]*linked // inodes with several names
	inodes uint64
	meta   uint64 // end of the metadata, in bytes
	data   uint64 // data blocks
	out    *erofs.Writer
	shared uint32 // id of the shared metacopy xattr
}

type linked struct {
	node  uint32
	nlink uint32
}

// Write merges the chain and writes the EROFS image to w, front to back, without seeking or syncing. The same captures
// give the same bytes. Memory is the captures' size and some 50 bytes for each visible name. Errors about a capture
// name its file and are of the classes of [VerifyCapture]; what EROFS cannot hold is errdefs.ErrInvalidArgument.
func Write(ctx context.Context, c Chain, w io.Writer) (TreeStats, error) {
	layers, err := c.open()
	if err != nil {
		return TreeStats{}, err
	}
	return writeLayers(ctx, layers, w)
}

func writeLayers(ctx context.Context, layers []*layer, w io.Writer) (TreeStats, error) {
	t := &writer{ctx: ctx, layers: layers, links: map[uint64]*linked{}, out: &erofs.Writer{W: w}}
	for _, step := range []func() error{t.collect, t.layout, t.writeMeta, t.writeData} {
		if err := step(); err != nil {
			return TreeStats{}, err
		}
	}
	return TreeStats{Entries: int64(len(t.nodes)), Inodes: int64(t.inodes), Bytes: t.out.Pos}, nil
}

// collect makes the nodes, in path order.
func (t *writer) collect() error {
	type frame struct {
		node  uint32
		last  uint32 // last name so far
		names erofs.DirNames
		size  erofs.DirLayout
	}
	var frames []*frame
	var free []*frame // frames are many, their closures need not be
	return merge(t.ctx, t.layers, visitor{
		enter: func(v *visible) error {
			if len(t.nodes) == 1<<32-1 {
				return fmt.Errorf("write tree: more than 2^32 names: %w", errdefs.ErrInvalidArgument)
			}
			i := uint32(len(t.nodes))
			n := node{rec: nodeID(v.layer.index, v.rec.off), typ: erofs.FileType(v.ino.mode), depth: uint16(v.rec.depth)}
			if len(frames) > 0 {
				f := frames[len(frames)-1]
				f.names.Name(v.rec.name)
				if f.last == 0 {
					t.nodes[f.node].child = i
				} else {
					t.nodes[f.last].next = i
				}
				f.last = i
			}
			if v.ino.multi {
				if l := t.links[v.id()]; l != nil {
					l.nlink++
					n.alias, n.child = true, l.node
					t.nodes = append(t.nodes, n)
					return nil
				}
				t.links[v.id()] = &linked{node: i, nlink: 1}
			}
			t.inodes++
			if err := n.measure(v); err != nil {
				return err
			}
			t.nodes = append(t.nodes, n)
			if isDir(v.ino.mode) {
				var f *frame
				if len(free) > 0 {
					f, free = free[len(free)-1], free[:len(free)-1]
				} else {
					f = &frame{}
					f.names.Add = func(name []byte, _ int) { f.size.Add(len(name)) }
				}
				f.node, f.last, f.names.Dots, f.size = i, 0, 0, erofs.DirLayout{}
				frames = append(frames, f)
			}
			return nil
		},
		leave: func() error {
			f := frames[len(frames)-1]
			f.names.End()
			if f.size.Size() >= 1<<32 {
				return fmt.Errorf("write tree: a directory needs %d bytes, the limit is 2^32: %w", f.size.Size(), errdefs.ErrInvalidArgument)
			}
			t.nodes[f.node].tail = uint32(f.size.Size())
			frames, free = frames[:len(frames)-1], append(free, f)
			return nil
		},
	})
}

// measure sets what follows the inode of v, but for directories, which are not known yet.
func (n *node) measure(v *visible) error {
	redirect := 0
	switch {
	case v.ino.hasData():
		redirect = len(v.redirect(nil))
		chunks := (v.ino.size-1)>>chunkBits + 1
		n.tail = uint32(chunks * 4)
	case v.ino.target != nil:
		n.tail = uint32(len(v.ino.target))
	}
	x := xattrArea(v.ino, redirect)
	if (x-xattrHeaderSize)/4+1 > 1<<16-1 || redirect > maxValue {
		return fmt.Errorf("write tree: %q of layer %s has %d bytes of xattrs, more than EROFS can hold: %w",
			v.path, v.layer.id, x, errdefs.ErrInvalidArgument)
	}
	n.xsize = uint32(x)
	return nil
}

// inlineTail is the part of the tail that follows the xattrs, and must not cross a block.
func (n *node) inlineTail() (blocks uint32, inline int, whole bool) {
	switch n.typ {
	case erofs.FileType(unix.S_IFDIR), erofs.FileType(unix.S_IFLNK):
		blocks, inline = split(uint64(n.tail))
		return blocks, inline, true
	}
	return 0, int(n.tail), false // chunk indexes are read one by one
}

// layout gives each inode its place.
func (t *writer) layout() error {
	sharedOff := erofs.SuperOffset + erofs.SuperSize
	t.shared = uint32(sharedOff / 4) // counted from xattr_blkaddr, block 0
	pos := uint64(sharedOff + erofs.XattrSize(len(metacopyName)-len("trusted."), 0))
	for i := range t.nodes {
		n := &t.nodes[i]
		if n.alias {
			n.nid = t.nodes[n.child].nid
			continue
		}
		blocks, inline, whole := n.inlineTail()
		n.block = uint32(t.data)
		t.data += uint64(blocks)
		pos = erofs.Align(pos, erofs.SlotSize)
		head := uint64(erofs.InodeSize) + uint64(n.xsize)
		for pos%erofs.BlockSize+erofs.InodeSize > erofs.BlockSize || whole && inline > 0 && (pos+head)%erofs.BlockSize+uint64(inline) > erofs.BlockSize {
			pos += erofs.SlotSize
		}
		if pos/erofs.SlotSize > 1<<32-1 {
			return fmt.Errorf("write tree: the inodes need more than 128 GiB: %w", errdefs.ErrInvalidArgument)
		}
		n.nid = uint32(pos / erofs.SlotSize)
		pos += head + uint64(inline)
	}
	// Readers look further than they need: go-erofs fetches a whole block from the shared xattr on, fsck.erofs an xattr
	// header behind inodes that have none. The image must not end there.
	t.meta = max(erofs.Align(pos+xattrHeaderSize, erofs.BlockSize), 2*erofs.BlockSize)
	if t.meta/erofs.BlockSize+t.data > 1<<32-1 {
		return fmt.Errorf("write tree: the image needs more than 2^32 blocks: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// read fetches the record of a node and the inode behind it.
func (t *writer) read(n *node, rec, link *record) (*layer, *inode, error) {
	l := t.layers[n.rec>>48]
	if err := l.at(int(n.rec&(1<<48-1)), rec); err != nil {
		return nil, nil, err
	}
	if !rec.is(flagLink) {
		return l, &rec.inode, nil
	}
	return l, &link.inode, l.at(rec.linkTo, link)
}

// writeMeta writes everything up to the data blocks.
func (t *writer) writeMeta() error {
	super := erofs.Super{
		Volume: volumeName, RootNid: uint16(t.nodes[0].nid), Inos: t.inodes, Blocks: uint32(t.meta/erofs.BlockSize + t.data),
		UUID: imageUUID(t.layers), Incompat: erofs.IncompatChunkedFile,
	}
	t.out.Pad(erofs.SuperOffset)
	t.out.Write(super.Bytes())
	t.out.Write(erofs.AppendXattr(nil, 4, metacopyName[len("trusted."):], ""))

	var rec, link record
	var path, redirect, buf []byte
	var ends []int       // length of the path of each directory above
	var parents []uint32 // their nodes
	ino := uint32(0)
	for i := range t.nodes {
		if i%1024 == 0 && t.ctx.Err() != nil {
			return t.ctx.Err()
		}
		n := &t.nodes[i]
		l, in, err := t.read(n, &rec, &link)
		if err != nil {
			return err
		}
		if n.depth > 0 {
			ends, parents = ends[:n.depth], parents[:n.depth]
			if path = path[:ends[n.depth-1]]; len(path) > 0 {
				path = append(path, '/')
			}
			path = append(path, rec.name...)
		}
		ends, parents = append(ends, len(path)), append(parents, uint32(i))
		if n.alias {
			continue
		}
		ino++
		d := erofs.Inode{Mode: in.mode, UID: in.uid, GID: in.gid, Sec: in.sec, Nsec: in.nsec,
			XattrSize: int(n.xsize), Size: in.size, Ino: ino, Nlink: 1}
		if in.multi {
			d.Nlink = t.links[nodeID(l.index, identity(&rec))].nlink
		}
		redirect = redirect[:0]
		blocks, inline, whole := n.inlineTail()
		if whole {
			d.Size, d.U = uint64(n.tail), uint32(t.meta/erofs.BlockSize)+n.block
			if blocks == 0 {
				d.U = 0
			}
			if inline > 0 {
				d.Layout = erofs.LayoutInline
			}
		}
		var parent uint32
		switch n.typ {
		case erofs.FileType(unix.S_IFDIR):
			d.Nlink = t.dirLinks(n)
			if n.depth > 0 {
				parent = parents[n.depth-1]
			}
		case erofs.FileType(unix.S_IFREG):
			if in.hasData() {
				redirect = appendRedirect(redirect, l.id, in, path)
				d.Layout, d.U = erofs.LayoutChunk, chunkFormat
			}
		case erofs.FileType(unix.S_IFCHR), erofs.FileType(unix.S_IFBLK):
			d.U, _ = erofs.EncodeDev(in.rdev)
		}
		t.out.Pad(int64(n.nid) * erofs.SlotSize)
		buf = appendXattrArea(d.Append(buf[:0]), in, redirect, t.shared)
		switch {
		case n.typ == erofs.FileType(unix.S_IFDIR) && inline > 0:
			buf, err = t.appendDir(buf, uint32(i), parent, int(blocks), 1<<32)
		case n.typ == erofs.FileType(unix.S_IFLNK) && inline > 0:
			buf = append(buf, in.target[len(in.target)-inline:]...)
		case d.Layout == erofs.LayoutChunk:
			for range n.tail / 4 {
				buf = binary.LittleEndian.AppendUint32(buf, erofs.NullAddr)
			}
		}
		if err != nil {
			return err
		}
		if t.out.Write(buf); t.out.Err != nil {
			return t.out.Err
		}
	}
	t.out.Pad(int64(t.meta))
	return t.out.Err
}

// identity is the offset of the record that holds the inode.
func identity(rec *record) int {
	if rec.is(flagLink) {
		return rec.linkTo
	}
	return rec.off
}

// writeData writes the data blocks: of large directories and of long symlinks.
func (t *writer) writeData() error {
	var rec, link record
	var parents []uint32
	for i := range t.nodes {
		n := &t.nodes[i]
		if n.depth > 0 {
			parents = parents[:n.depth]
		}
		parents = append(parents, uint32(i))
		if n.alias {
			continue
		}
		blocks, _, whole := n.inlineTail()
		if !whole || blocks == 0 {
			continue
		}
		end := int64(t.meta) + int64(n.block+blocks)*erofs.BlockSize
		if n.typ == erofs.FileType(unix.S_IFLNK) {
			_, in, err := t.read(n, &rec, &link)
			if err != nil {
				return err
			}
			t.out.Write(in.target[:min(len(in.target), int(blocks)*erofs.BlockSize)])
		} else {
			var parent uint32
			if n.depth > 0 {
				parent = parents[n.depth-1]
			}
			buf, err := t.appendDir(nil, uint32(i), parent, 0, int(blocks))
			if err != nil {
				return err
			}
			t.out.Write(buf)
		}
		if t.out.Pad(end); t.out.Err != nil {
			return t.out.Err
		}
	}
	return t.out.Flush()
}

// dirLinks is two and the number of directories in n.
func (t *writer) dirLinks(n *node) uint32 {
	links := uint32(2)
	for c := n.child; c != 0; c = t.nodes[c].next {
		if t.nodes[c].typ == erofs.FileType(unix.S_IFDIR) {
			links++
		}
	}
	return links
}

// appendDir appends the blocks from first up to, not including, end of the directory at node dir.
func (t *writer) appendDir(b []byte, dir, parent uint32, first, end int) ([]byte, error) {
	var (
		entries []erofs.Dirent
		layout  erofs.DirLayout
		rec     record
		child   *node
	)
	flush := func(block int, full bool) {
		if block >= first && block < end {
			b = erofs.AppendDirBlock(b, entries, full)
		}
		entries = entries[:0]
	}
	names := erofs.DirNames{Add: func(name []byte, dot int) {
		if layout.Add(len(name)) {
			flush(layout.Blocks-1, true)
		}
		e := erofs.Dirent{Type: erofs.FileType(unix.S_IFDIR), Name: name}
		switch dot {
		case 0:
			e.Nid, e.Type = uint64(child.nid), child.typ
		case 1:
			e.Nid = uint64(t.nodes[dir].nid)
		case 2:
			e.Nid = uint64(t.nodes[parent].nid)
		}
		entries = append(entries, e)
	}}
	for c := t.nodes[dir].child; c != 0; c = child.next {
		child = &t.nodes[c]
		l := t.layers[child.rec>>48]
		if err := l.at(int(child.rec&(1<<48-1)), &rec); err != nil {
			return nil, err
		}
		names.Name(rec.name)
	}
	names.End()
	flush(layout.Blocks, false)
	return b, nil
}
