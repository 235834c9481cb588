// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import "encoding/binary"

const (
	blockSize  = 4096
	superblock = 1024
	rootNid    = (superblock + 128) / 32 // inodes are numbered by their place, in steps of 32 bytes
	fileNid    = rootNid + 4             // the root takes 32 bytes and its entries 12 * 3 + 8
)

// Image makes an EROFS image of one block for Probe: a root directory and one file that is a hole of the right size and
// has its data elsewhere, the way the trees of containers are made.
//
// The layout is that of Linux's fs/erofs/erofs_fs.h: a superblock, then compact inodes, each followed by its attributes
// and its inline data or chunk addresses.
func Image() []byte {
	b := make([]byte, blockSize)
	le := binary.LittleEndian

	sb := b[superblock:]
	le.PutUint32(sb[0:], 0xE0F5E1E2) // magic
	sb[12] = 12                      // log2 of the block size
	le.PutUint16(sb[14:], rootNid)
	le.PutUint64(sb[16:], 2)   // inodes
	le.PutUint32(sb[36:], 1)   // blocks
	le.PutUint32(sb[80:], 0x4) // incompatible features: chunk-based files

	entries := make([]byte, 0, 44)
	nameOffset, names := 36, ""
	for _, e := range []struct {
		name string
		nid  uint64
		kind byte // FT_DIR, FT_REG_FILE
	}{{".", rootNid, 2}, {"..", rootNid, 2}, {probeName, fileNid, 1}} {
		entries = le.AppendUint64(entries, e.nid)
		entries = le.AppendUint16(entries, uint16(nameOffset+len(names)))
		entries = append(entries, e.kind, 0)
		names += e.name
	}
	entries = append(entries, names...)

	const trusted = 4 // EROFS_XATTR_INDEX_TRUSTED
	xattrs := make([]byte, 12, 64)
	for _, x := range []struct{ name, value string }{{"overlay.metacopy", ""}, {"overlay.redirect", probeRedirect}} {
		xattrs = append(xattrs, byte(len(x.name)), trusted)
		xattrs = le.AppendUint16(xattrs, uint16(len(x.value)))
		xattrs = append(append(xattrs, x.name...), x.value...)
		for len(xattrs)%4 != 0 {
			xattrs = append(xattrs, 0)
		}
	}

	const inline, chunked = 2, 4 // data layouts
	root := inode(b, rootNid, inline, 0o040755, 2, len(entries), nil)
	copy(root, entries)
	file := inode(b, fileNid, chunked, 0o100644, 1, len(probeData), xattrs)
	le.PutUint32(file, 0xFFFFFFFF) // the only chunk: a hole
	return b
}

// inode writes a compact inode and returns the place behind it.
func inode(b []byte, nid, layout, mode, links, size int, xattrs []byte) []byte {
	le := binary.LittleEndian
	i := b[nid*32:]
	le.PutUint16(i[0:], uint16(layout<<1))
	if len(xattrs) > 0 {
		le.PutUint16(i[2:], uint16((len(xattrs)-12)/4+1))
	}
	le.PutUint16(i[4:], uint16(mode))
	le.PutUint16(i[6:], uint16(links))
	le.PutUint32(i[8:], uint32(size))
	le.PutUint32(i[20:], uint32(nid))
	copy(i[32:], xattrs)
	return i[32+len(xattrs):]
}
