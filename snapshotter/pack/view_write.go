// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Places in a view. The root stands in front of all that varies, since the
// superblock has 16 bits for its nid:
//
//	1024  superblock
//	1152  root, with t and h
//	1280  device table, each slot tagged with the layer of the pack
//	then  shared xattrs: trusted.overlay.metacopy
//	then  inodes of t/ in path order, of h/ by device and path
//	then  data blocks of large directories and long symlinks
//	then  the footer, behind the image
const (
	rootPos   = erofs.SuperOffset + erofs.SuperSize
	rootNid   = rootPos / erofs.SlotSize
	tablePos  = rootPos + erofs.DeviceSlotSize
	tableSlot = tablePos / erofs.DeviceSlotSize

	maxChunkFormat = 31 // chunks of 2^31 blocks, 8 TiB, the largest that an inode can have
	holeChunkBits  = erofs.BlockBits + maxChunkFormat

	typeFile, typeDir = 1, 2 // erofs.FileType

	// Only overlayfs is to read below h/, as whoever mounted it. The files show the
	// data of files that not everybody may read.
	dirMode  = unix.S_IFDIR | 0o700
	fileMode = unix.S_IFREG | 0o600
)

// split tells how much of size stands in data blocks and how much behind the
// inode.
func split(size uint64) (blocks uint32, inline int) {
	if t := size % erofs.BlockSize; t <= erofs.TailMax {
		return uint32(size / erofs.BlockSize), int(t)
	}
	return uint32(size/erofs.BlockSize) + 1, 0
}

// inlineTail is the part of the tail that follows the xattrs, and must not cross
// a block.
func (n *viewNode) inlineTail() (blocks uint32, inline int, whole bool) {
	if n.typ == typeDir || n.inode.Inline != "" {
		blocks, inline = split(uint64(n.tail))
		return blocks, inline, true
	}
	return 0, int(n.tail), false // chunk indexes are read one by one
}

// layout gives each inode its place.
func (v *viewWriter) layout() error {
	table := tablePos + uint64(len(v.home.devices))*erofs.DeviceSlotSize
	v.shared = uint32(table / 4) // counted from xattr_blkaddr, block 0
	p := placer{pos: table + uint64(erofs.XattrSize(len(XattrMetacopy)-len(trusted), 0))}
	for i := range v.nodes {
		n := &v.nodes[i]
		if n.alias {
			n.nid = v.nodes[n.child].nid
			continue
		}
		blocks, inline, whole := n.inlineTail()
		n.nid, n.block = p.place(erofs.InodeSize, int(n.xattrs), inline, whole), uint32(p.data)
		p.data += uint64(blocks)
	}
	for i := range v.home.dirs {
		d := &v.home.dirs[i]
		blocks, inline := split(uint64(d.size))
		d.nid, d.block = p.place(erofs.InodeSize, 0, inline, true), uint32(p.data)
		p.data += uint64(blocks)
		for j := range d.files {
			inode, indexes := fileSize(d.files[j].inode)
			d.files[j].nid = p.place(inode, 0, indexes, false)
		}
	}
	if p.pos/erofs.SlotSize > 1<<32-1 {
		return fmt.Errorf("the inodes need more than 128 GiB: %w", errdefs.ErrInvalidArgument)
	}
	// Readers look further than they need: go-erofs fetches a whole block from the
	// shared xattr on, fsck.erofs an xattr header behind inodes that have none. The
	// image must not end there.
	v.meta = erofs.Align(max(p.pos+erofs.XattrHeaderSize, table+erofs.BlockSize), erofs.BlockSize)
	v.data = p.data
	if v.meta/erofs.BlockSize+v.data > 1<<32-1 {
		return fmt.Errorf("the image needs more than 2^32 blocks: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// placer gives inodes their places one after the other, and counts data blocks.
type placer struct{ pos, data uint64 }

// place returns the nid of an inode with an area of xattrs and a tail behind it.
// Neither the inode nor a whole tail crosses a block.
func (p *placer) place(inode, xattrs, tail int, whole bool) uint32 {
	pos := erofs.Align(p.pos, erofs.SlotSize)
	head := uint64(inode + xattrs)
	for pos%erofs.BlockSize+uint64(inode) > erofs.BlockSize || whole && tail > 0 && (pos+head)%erofs.BlockSize+uint64(tail) > erofs.BlockSize {
		pos += erofs.SlotSize
	}
	p.pos = pos + head + uint64(tail)
	return uint32(pos / erofs.SlotSize)
}

// writeTree writes superblock, root, device table, shared xattrs and the inodes
// of t/.
func (v *viewWriter) writeTree() error {
	v.writeHead()
	var buf []byte
	for i := range v.nodes {
		if i%1024 == 0 && v.ctx.Err() != nil {
			return v.ctx.Err()
		}
		n := &v.nodes[i]
		if n.alias {
			continue
		}
		buf = v.appendInode(buf[:0], uint32(i))
		v.out.Pad(int64(n.nid) * erofs.SlotSize)
		if v.out.Write(buf); v.out.Err != nil {
			return v.out.Err
		}
	}
	return nil
}

func (v *viewWriter) writeHead() {
	super := erofs.Super{
		Volume: viewVolume, RootNid: rootNid, Inos: 1 + v.inodes + uint64(len(v.home.dirs)+len(v.home.files)),
		Blocks: uint32(v.meta/erofs.BlockSize + v.data), UUID: v.uuid(), Incompat: erofs.IncompatChunkedFile,
	}
	if n := len(v.home.devices); n > 0 {
		super.Incompat |= erofs.IncompatDeviceTable
		super.Devices, super.DeviceTable = uint16(n), tableSlot
	}
	v.out.Pad(erofs.SuperOffset)
	v.out.Write(super.Bytes())
	dir := v.dirs.begin(nil, rootNid, rootNid, 0, 1)
	dir.add([]byte("h"), uint64(v.home.dirs[0].nid), typeDir)
	dir.add([]byte("t"), uint64(v.nodes[0].nid), typeDir)
	entries := dir.finish()
	v.ino++
	root := erofs.Inode{Mode: dirMode, Layout: erofs.LayoutInline, Size: uint64(len(entries)), Ino: v.ino, Nlink: 4}
	v.out.Write(append(root.Append(nil), entries...))
	v.out.Pad(tablePos)
	for i, layer := range v.home.devices {
		v.out.Write(erofs.AppendTaggedSlot(nil, deviceTag(layer), v.home.blocks[i]))
	}
	v.out.Write(erofs.AppendXattr(nil, trustedType, XattrMetacopy[len(trusted):], ""))
}

// uuid follows from the layers: their numbers are never given out again.
func (v *viewWriter) uuid() (uuid [16]byte) {
	h := sha256.New()
	h.Write([]byte(viewVolume))
	var b [8]byte
	for _, m := range v.chain {
		binary.LittleEndian.PutUint64(b[:], m.Layer)
		h.Write(b[:])
	}
	copy(uuid[:], h.Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80 // version 8: made by a scheme of our own
	uuid[8] = uuid[8]&0x3f | 0x80
	return uuid
}

// appendInode appends the inode of a node with what stands behind it.
func (v *viewWriter) appendInode(b []byte, i uint32) []byte {
	n := &v.nodes[i]
	in := n.inode
	v.ino++
	d := erofs.Inode{
		Mode: in.Mode, UID: in.UID, GID: in.GID, Sec: in.Sec, Nsec: in.Nsec, XattrSize: int(n.xattrs), Ino: v.ino, Nlink: 1,
	}
	if l := v.links[in]; l != nil {
		d.Nlink = l.names
	}
	redirect := ""
	blocks, inline, whole := n.inlineTail()
	if whole {
		d.Size = uint64(n.tail)
		if blocks > 0 {
			d.U = uint32(v.meta/erofs.BlockSize) + n.block
		}
		if inline > 0 {
			d.Layout = erofs.LayoutInline
		}
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		d.Nlink = v.dirLinks(n)
	case unix.S_IFREG:
		if d.Size = uint64(in.Size); in.HasData() {
			v.redirect = in.Data.AppendRedirect(v.redirect[:0])
			redirect = unsafe.String(&v.redirect[0], len(v.redirect))
			d.Layout, d.U = erofs.LayoutChunk, maxChunkFormat
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		d.U, _ = erofs.EncodeDev(in.Rdev) // measure has checked it
	}
	b = appendXattrArea(d.Append(b), in, redirect, v.shared)
	switch {
	case n.typ == typeDir && inline > 0:
		b = v.appendDir(b, i, int(blocks), 1<<32)
	case whole && inline > 0:
		b = append(b, in.Inline[len(in.Inline)-inline:]...)
	case d.Layout == erofs.LayoutChunk:
		for range n.tail / 4 {
			b = binary.LittleEndian.AppendUint32(b, erofs.NullAddr)
		}
	}
	return b
}

// dirLinks is two and the number of directories in n.
func (v *viewWriter) dirLinks(n *viewNode) uint32 {
	links := uint32(2)
	for c := n.child; c != 0; c = v.nodes[c].next {
		if v.nodes[c].typ == typeDir {
			links++
		}
	}
	return links
}

// appendDir appends the blocks from first up to, not including, end of the
// directory at node dir.
func (v *viewWriter) appendDir(b []byte, dir uint32, first, end int) []byte {
	d := &v.nodes[dir]
	parent := uint64(v.nodes[d.parent].nid)
	if dir == 0 {
		parent = rootNid
	}
	w := v.dirs.begin(b, uint64(d.nid), parent, first, end)
	for c := d.child; c != 0; c = v.nodes[c].next {
		n := &v.nodes[c]
		w.add(bytesOf(n.node.Name), uint64(n.nid), n.typ)
	}
	return w.finish()
}

// writeHome writes the inodes of h/.
func (v *viewWriter) writeHome() error {
	if err := v.home.write(v.ctx, v.out, uint32(v.meta/erofs.BlockSize), &v.ino); err != nil {
		return err
	}
	v.out.Pad(int64(v.meta))
	return v.out.Err
}

// writeData writes the data blocks, of large directories and of long symlinks.
func (v *viewWriter) writeData() error {
	put := func(data []byte, block, blocks uint32) error {
		v.out.Write(data)
		v.out.Pad(int64(v.meta) + int64(block+blocks)*erofs.BlockSize)
		return v.out.Err
	}
	var data []byte
	for i := range v.nodes {
		n := &v.nodes[i]
		blocks, _, whole := n.inlineTail()
		if n.alias || !whole || blocks == 0 {
			continue
		}
		if n.typ == typeDir {
			data = v.appendDir(data[:0], uint32(i), 0, int(blocks))
		} else {
			data = append(data[:0], n.inode.Inline[:min(len(n.inode.Inline), int(blocks)*erofs.BlockSize)]...)
		}
		if err := put(data, n.block, blocks); err != nil {
			return err
		}
	}
	for i := range v.home.dirs {
		if blocks, _ := split(uint64(v.home.dirs[i].size)); blocks > 0 {
			data = v.home.appendDir(data[:0], i, 0, int(blocks))
			if err := put(data, v.home.dirs[i].block, blocks); err != nil {
				return err
			}
		}
	}
	return v.out.Flush()
}
