// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// super is block 0.
func (m *metaWriter) super(id Identity) ([]byte, error) {
	text, err := json.Marshal(id)
	if err != nil {
		return nil, fmt.Errorf("encode identity of layer %d: %w", id.Layer, err)
	}
	sum := sha256.Sum256(append([]byte(volumeName), text...))
	s := erofs.Super{
		Volume: volumeName, RootNid: uint16(m.entries[0].nid), Inos: uint64(m.stats.Inodes), UUID: [16]byte(sum[:16]),
		Blocks: m.start + m.inodes + m.blocks, MetaBlock: m.start, Incompat: erofs.IncompatChunkedFile,
	}
	s.UUID[6] = s.UUID[6]&0x0f | 0x80 // version 8: made by a scheme of our own
	s.UUID[8] = s.UUID[8]&0x3f | 0x80
	block := make([]byte, BlockSize)
	copy(block[erofs.SuperOffset:], s.Bytes())
	erofs.SetChecksum(block)
	return block, nil
}

// write writes the metadata, front to back.
func (m *metaWriter) write(w io.Writer) error {
	base := int64(m.start) * BlockSize
	out := &erofs.Writer{W: w, Pos: base}
	ino := m.meta.Numbers
	var buf []byte
	for i := range m.entries {
		if m.alias(i) {
			continue
		}
		e := &m.entries[i]
		in := e.inode()
		d := erofs.Inode{Mode: in.Mode, UID: in.UID, GID: in.GID, Sec: in.Sec, Nsec: in.Nsec, XattrSize: int(e.xsize), Nlink: max(in.Nlink, 1)}
		blocks, inline, whole := e.inlineTail()
		if whole {
			d.Size = uint64(e.tail)
			if blocks > 0 {
				d.U = m.start + m.inodes + e.block
			}
			if inline > 0 {
				d.Layout = erofs.LayoutInline
			}
		}
		own := false
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			d.Nlink = m.dirLinks(e)
		case unix.S_IFREG:
			d.Size = uint64(in.Size)
			if own = in.HasData() && in.Data.Layer == m.meta.Layer; own {
				d.U, d.Ino = in.Block, in.Data.Number
			} else if in.HasData() {
				d.Layout, d.U = erofs.LayoutChunk, refChunkFormat
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			d.U, _ = erofs.EncodeDev(in.Rdev)
			if in == whiteInode {
				d.Nlink = m.white.names
			}
		}
		if !own {
			ino++
			d.Ino = ino
		}
		out.Pad(base + int64(e.nid)*erofs.SlotSize)
		buf = appendXattrs(d.Append(buf[:0]), in, m.meta.Layer, int(e.xsize))
		switch {
		case e.dir() && inline > 0:
			buf = m.appendDir(buf, uint32(i), int(blocks), 1<<32)
		case whole && inline > 0:
			buf = append(buf, in.Inline[len(in.Inline)-inline:]...)
		case d.Layout == erofs.LayoutChunk:
			for range e.tail / 4 {
				buf = binary.LittleEndian.AppendUint32(buf, erofs.NullAddr)
			}
		}
		if out.Write(buf); out.Err != nil {
			return out.Err
		}
	}
	for i := range m.entries {
		e := &m.entries[i]
		blocks, _, whole := e.inlineTail()
		if m.alias(i) || !whole || blocks == 0 {
			continue
		}
		out.Pad(base + int64(m.inodes+e.block)*BlockSize)
		if e.dir() {
			out.Write(m.appendDir(buf[:0], uint32(i), 0, int(blocks)))
		} else {
			out.Write([]byte(e.node.Inode.Inline)[:min(len(e.node.Inode.Inline), int(blocks)*BlockSize)])
		}
	}
	out.Pad(base + int64(m.inodes+m.blocks)*BlockSize)
	return out.Flush()
}

// dirLinks is two and the number of directories in e.
func (m *metaWriter) dirLinks(e *entry) uint32 {
	links := uint32(2)
	for _, c := range e.node.Children {
		if c.Dir() {
			links++
		}
	}
	return links
}

// appendDir appends the blocks from first up to, not including, end of the directory at entry i.
func (m *metaWriter) appendDir(b []byte, i uint32, first, end int) []byte {
	dir := &m.entries[i]
	var layout erofs.DirLayout
	entries, text, next := m.dirents[:0], m.text[:0], dir.first
	flush := func(block int, full bool) {
		if block >= first && block < end {
			b = erofs.AppendDirBlock(b, entries, full)
		}
		entries, text = entries[:0], text[:0]
	}
	names := erofs.DirNames{Add: func(name []byte, dot int) {
		if layout.Add(len(name)) {
			flush(layout.Blocks-1, true)
		}
		text = append(text, name...)
		e := erofs.Dirent{Type: erofs.FileType(unix.S_IFDIR), Name: text[len(text)-len(name):]}
		switch dot {
		case 0:
			c := &m.entries[next]
			e.Nid, e.Type = uint64(c.nid), erofs.FileType(c.inode().Mode)
			next++
		case 1:
			e.Nid = uint64(dir.nid)
		case 2:
			e.Nid = uint64(m.entries[dir.parent].nid)
		}
		entries = append(entries, e)
	}}
	var buf [nameMax]byte
	for _, c := range dir.node.Children {
		names.Name(buf[:copy(buf[:], c.Name)])
	}
	names.End()
	flush(layout.Blocks, false)
	m.dirents, m.text = entries, text
	return b
}
