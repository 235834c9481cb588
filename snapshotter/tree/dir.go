// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import "encoding/binary"

// A directory is a sequence of blocks, each with its entries first and their names behind them. Entries are in strict
// byte order over the whole directory, "." and ".." among them.

// dirLayout measures a directory name by name. The same rule places them when they are written.
type dirLayout struct {
	blocks int // full ones
	used   int // of the last block
}

func (d *dirLayout) add(nameLen int) (newBlock bool) {
	need := direntSize + nameLen
	if d.used+need > blockSize {
		d.blocks++
		d.used = 0
		newBlock = true
	}
	d.used += need
	return newBlock
}

func (d *dirLayout) size() uint64 { return uint64(d.blocks)*blockSize + uint64(d.used) }

// dirNames feeds names in byte order to add, putting "." and ".." into their places.
type dirNames struct {
	dots int // how many of "." and ".." were given
	add  func(name []byte, dot int)
}

var dots = [2][]byte{[]byte("."), []byte("..")}

func (d *dirNames) name(name []byte) {
	for d.dots < 2 && string(name) > string(dots[d.dots]) {
		d.dots++
		d.add(dots[d.dots-1], d.dots)
	}
	d.add(name, 0)
}

func (d *dirNames) end() {
	for d.dots < 2 {
		d.dots++
		d.add(dots[d.dots-1], d.dots)
	}
}

type dirent struct {
	nid  uint64
	typ  byte
	name []byte
}

// appendDirBlock appends one block; a full one is padded.
func appendDirBlock(b []byte, entries []dirent, full bool) []byte {
	begin := len(b)
	off := len(entries) * direntSize
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint64(b, e.nid)
		b = binary.LittleEndian.AppendUint16(b, uint16(off))
		b = append(b, e.typ, 0)
		off += len(e.name)
	}
	for _, e := range entries {
		b = append(b, e.name...)
	}
	for full && len(b)-begin < blockSize {
		b = append(b, 0)
	}
	return b
}
