// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"math/bits"
)

// Places that every region has.
const (
	headerSize = 4096
	rootAt     = 2 * headerSize
	lanesAt    = 3 * headerSize
	line       = 64
	minSize    = 64 << 10
	maxSize    = 1 << 46
)

// geometry is where things lie in a region. It is in the header, so that regions of other proportions can be read.
type geometry struct {
	size       uint64
	lanesOff   uint64
	lanes      uint32
	laneSize   uint32
	tableOff   uint64
	heapOff    uint64
	chunkSize  uint32
	chunkCount uint32
}

func alignUp(n, to uint64) uint64 { return (n + to - 1) &^ (to - 1) }

// newGeometry fits a region of the given size. Small regions have small chunks and few lanes, so that most of them is heap.
func newGeometry(size uint64, o *Options) (geometry, error) {
	g := geometry{size: size, lanesOff: lanesAt, lanes: uint32(o.Lanes), laneSize: uint32(o.LaneSize), chunkSize: uint32(o.ChunkSize)}
	if size < minSize || size > maxSize || size%4096 != 0 {
		return g, fmt.Errorf("%w: a region has %d to %d bytes and a multiple of 4096, not %d", ErrSize, minSize, uint64(maxSize), size)
	}
	if g.lanes == 0 {
		g.lanes = uint32(min(max(size>>18, 2), 64))
	}
	if g.laneSize == 0 {
		g.laneSize = 8 << 10
		if size < 4<<20 {
			g.laneSize = 4 << 10
		}
	}
	if g.chunkSize == 0 {
		switch {
		case size < 4<<20:
			g.chunkSize = 16 << 10
		case size < 16<<20:
			g.chunkSize = 64 << 10
		default:
			g.chunkSize = 256 << 10
		}
	}
	g.tableOff = alignUp(g.lanesOff+uint64(g.lanes)*uint64(g.laneSize), 4096)
	align := uint64(4096)
	if size >= 64<<20 {
		align = 2 << 20 // so that chunks do not straddle huge pages
	}
	for n := size / uint64(g.chunkSize); n > 0; n-- {
		g.heapOff, g.chunkCount = alignUp(g.tableOff+8*n, align), uint32(n)
		if g.heapOff+n*uint64(g.chunkSize) <= size {
			break
		}
		g.chunkCount = 0
	}
	if err := g.check(); err != nil {
		return g, fmt.Errorf("%w: %w", ErrSize, err)
	}
	return g, nil
}

// check tells what the format does not allow. It is what stands between a hostile header and the rest of the library.
func (g *geometry) check() error {
	switch {
	case g.size < minSize || g.size > maxSize || g.size%4096 != 0:
		return fmt.Errorf("size %d", g.size)
	case g.lanesOff != lanesAt:
		return fmt.Errorf("lanes at %d", g.lanesOff)
	case g.lanes < 1 || g.lanes > 1024 || g.laneSize < 512 || g.laneSize > 1<<20 || g.laneSize%line != 0:
		return fmt.Errorf("%d lanes of %d bytes", g.lanes, g.laneSize)
	case g.chunkSize < 16<<10 || g.chunkSize > 16<<20 || bits.OnesCount32(g.chunkSize) != 1 || g.chunkCount < 1:
		return fmt.Errorf("%d chunks of %d bytes", g.chunkCount, g.chunkSize)
	case g.tableOff%4096 != 0 || g.tableOff > g.size || g.tableOff < g.lanesOff+uint64(g.lanes)*uint64(g.laneSize):
		return fmt.Errorf("chunk table at %d", g.tableOff)
	case g.heapOff%4096 != 0 || g.heapOff > g.size || g.heapOff < g.tableOff+8*uint64(g.chunkCount):
		return fmt.Errorf("heap at %d", g.heapOff)
	case uint64(g.chunkCount)*uint64(g.chunkSize) > g.size-g.heapOff:
		return fmt.Errorf("heap of %d chunks of %d bytes at %d in %d bytes", g.chunkCount, g.chunkSize, g.heapOff, g.size)
	}
	return nil
}

func (g *geometry) heapEnd() uint64         { return g.heapOff + uint64(g.chunkCount)*uint64(g.chunkSize) }
func (g *geometry) lane(i uint32) uint64    { return g.lanesOff + uint64(i)*uint64(g.laneSize) }
func (g *geometry) word(c uint32) uint64    { return g.tableOff + 8*uint64(c) }
func (g *geometry) chunk(c uint32) uint64   { return g.heapOff + uint64(c)*uint64(g.chunkSize) }
func (g *geometry) bitmap() uint64          { return uint64(g.chunkSize) / 256 }
func (g *geometry) chunkOf(o uint64) uint32 { return uint32((o - g.heapOff) / uint64(g.chunkSize)) }

// inHeap tells whether [off, off+n) lies in the heap.
func (g *geometry) inHeap(off, n uint64) bool {
	return off >= g.heapOff && n <= g.heapEnd()-g.heapOff && off <= g.heapEnd()-n
}

// Words of the chunk table.
const (
	chunkFree  = 0
	chunkRun   = 1
	chunkLarge = 2
)

func chunkWord(kind, class uint8, count uint32) uint64 {
	return uint64(kind) | uint64(class)<<8 | uint64(count)<<32
}

var classSizes = [...]uint32{32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096,
	5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768, 40960, 49152, 65280, 87040, 130560}

// blocks is how many blocks of a class a run holds.
func (g *geometry) blocks(class uint8) uint32 {
	return uint32((uint64(g.chunkSize) - g.bitmap()) / uint64(classSizes[class]))
}

// classOf is the smallest class that holds n bytes, or false if they need chunks of their own.
func (g *geometry) classOf(n uint64) (uint8, bool) {
	lo, hi := 0, len(classSizes)
	for lo < hi {
		if mid := (lo + hi) / 2; uint64(classSizes[mid]) < n {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return uint8(lo), lo < len(classSizes) && g.blocks(uint8(lo)) >= 2
}
