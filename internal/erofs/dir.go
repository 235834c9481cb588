// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"bytes"
	"encoding/binary"
)

// A directory is a sequence of blocks, each with its entries first and their names behind them. Entries are in strict
// byte order over the whole directory, "." and ".." among them.

// DirLayout measures a directory name by name. The same rule places them when they are written.
type DirLayout struct {
	Blocks int // full ones
	used   int // of the last block
}

// Add takes a name; newBlock says that it begins another block.
func (d *DirLayout) Add(nameLen int) (newBlock bool) {
	need := direntSize + nameLen
	if d.used+need > BlockSize {
		d.Blocks++
		d.used = 0
		newBlock = true
	}
	d.used += need
	return newBlock
}

// Size of the directory in bytes.
func (d *DirLayout) Size() uint64 { return uint64(d.Blocks)*BlockSize + uint64(d.used) }

// DirNames feeds names in byte order to Add, putting "." and ".." into their places.
type DirNames struct {
	Dots int                        // how many of "." and ".." were given
	Add  func(name []byte, dot int) // dot: 1 for ".", 2 for "..", else 0
}

var dots = [2][]byte{[]byte("."), []byte("..")}

// Name takes the next name.
func (d *DirNames) Name(name []byte) {
	for d.Dots < 2 && string(name) > string(dots[d.Dots]) {
		d.Dots++
		d.Add(dots[d.Dots-1], d.Dots)
	}
	d.Add(name, 0)
}

// End tells that there are no more names.
func (d *DirNames) End() {
	for d.Dots < 2 {
		d.Dots++
		d.Add(dots[d.Dots-1], d.Dots)
	}
}

// Dirent is an entry of a directory.
type Dirent struct {
	Nid  uint64
	Type byte // FileType
	Name []byte
}

// AppendDirBlock appends one block; a full one is padded.
func AppendDirBlock(b []byte, entries []Dirent, full bool) []byte {
	begin := len(b)
	off := len(entries) * direntSize
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint64(b, e.Nid)
		b = binary.LittleEndian.AppendUint16(b, uint16(off))
		b = append(b, e.Type, 0)
		off += len(e.Name)
	}
	for _, e := range entries {
		b = append(b, e.Name...)
	}
	for full && len(b)-begin < BlockSize {
		b = append(b, 0)
	}
	return b
}

// CountDirents returns how many entries the block of a directory says it has; ok is false where that is impossible.
func CountDirents(block []byte) (n int, ok bool) {
	if len(block) < direntSize {
		return 0, false
	}
	names := int(binary.LittleEndian.Uint16(block[8:]))
	return names / direntSize, names >= direntSize && names%direntSize == 0 && names < len(block)
}

// ParseDirents passes the entries of a block of a directory to add, until it returns false. It returns false then, and
// if the block is malformed; names are not judged. All names of a block are parts of one string.
func ParseDirents(block []byte, add func(nid uint64, typ byte, name string) bool) bool {
	n, ok := CountDirents(block)
	if !ok {
		return false
	}
	le := binary.LittleEndian
	block = bytes.TrimRight(block, "\x00") // names have none, what is behind them has
	base := n * direntSize
	if len(block) <= base {
		return false
	}
	names := string(block[base:])
	for i := range n {
		e := block[i*direntSize:]
		begin, end := int(le.Uint16(e[8:])), len(block)
		if i+1 < n {
			end = int(le.Uint16(e[direntSize+8:]))
		}
		if begin < base || end <= begin || end > len(block) || !add(le.Uint64(e), e[10], names[begin-base:end-base]) {
			return false
		}
	}
	return true
}
