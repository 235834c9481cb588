// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"math/bits"
	"sync"
)

// heap is the allocator's view in memory: what is used on the medium, and what running transactions have reserved. It is built from the chunk
// table at open; bitmaps of runs are read when a run is first needed.
type heap struct {
	r       *Region
	mu      sync.Mutex
	kind    []uint8 // of each chunk
	free    uint32  // chunks
	lent    uint32  // chunks that a commit has borrowed for its log: see room
	entries uint64  // bytes of the log that the largest commit needs
	room    room
	hint    uint32 // where the search for chunks begins
	runs    map[uint32]*run
	partial [len(classSizes)][]*run // with free blocks, as far as known
	freeing map[Off]struct{}        // by transactions that have not ended

	borrowing sync.Mutex // held by the commit that may use what is kept back; before mu
}

const (
	memFree = iota
	memRun
	memLarge
	memTail
	memReserved
)

type run struct {
	chunk  uint32
	class  uint8
	loaded bool
	listed bool
	used   []uint64 // allocated or reserved
	nfree  uint32
	hint   int
}

// allocOp is an allocation or a free that a transaction will carry out when it commits.
type allocOp struct {
	op       uint8 // opSet, opClear, or opUndo for a word of the chunk table
	at       uint64
	val      uint64 // mask, or the new word
	old      uint64 // the old word
	block    Off
	n        uint64
	run      *run
	chunks   uint32
	undone   bool // allocated and freed by the same transaction
	freeable bool // a free
}

// newHeap checks a chunk table and builds on it.
func newHeap(r *Region, table []byte) (*heap, error) {
	h := &heap{r: r, kind: make([]uint8, r.chunkCount), runs: map[uint32]*run{}, freeing: map[Off]struct{}{}, room: r.geometry.room()}
	for c := uint32(0); c < r.chunkCount; {
		w := le.Uint64(table[8*c:])
		kind, class, count := uint8(w), uint8(w>>8), uint32(w>>32)
		switch {
		case w == 0:
			h.free++
			c++
		case kind == chunkRun && int(class) < len(classSizes) && r.blocks(class) >= 2 && w == chunkWord(chunkRun, class, 0):
			h.kind[c] = memRun
			h.addRun(c, class)
			c++
		case kind == chunkLarge && count >= 1 && count <= r.chunkCount-c && w == chunkWord(chunkLarge, 0, count):
			h.kind[c] = memLarge
			h.entries += tableEntry
			for i := c + 1; i < c+count; i++ {
				if le.Uint64(table[8*i:]) != 0 {
					return nil, fmt.Errorf("%w: chunk %d lies inside the block at chunk %d", ErrCorrupt, i, c)
				}
				h.kind[i] = memTail
			}
			c += count
		default:
			return nil, fmt.Errorf("%w: chunk table, word %d is %#x", ErrCorrupt, c, w)
		}
	}
	return h, nil
}

func (h *heap) addRun(c uint32, class uint8) *run {
	n := h.r.blocks(class)
	ru := &run{chunk: c, class: class, nfree: n, listed: true}
	h.runs[c] = ru
	h.entries += h.r.runEntries(class)
	h.partial[class] = append(h.partial[class], ru)
	return ru
}

// load reads the bitmap. Bits behind the last block are set in memory, so that they are never handed out.
func (h *heap) load(ru *run) {
	if ru.loaded {
		return
	}
	n := h.r.blocks(ru.class)
	ru.used = make([]uint64, (n+63)/64)
	for i := range ru.used {
		ru.used[i] = h.r.mem.Load64(h.r.chunk(ru.chunk) + 8*uint64(i))
		if last := n - 64*uint32(i); last < 64 {
			ru.used[i] |= ^uint64(0) << last
		}
		ru.nfree -= min(ru.nfree, uint32(bits.OnesCount64(ru.used[i])))
	}
	ru.nfree = 0
	for _, w := range ru.used {
		ru.nfree += uint32(64 - bits.OnesCount64(w))
	}
	ru.loaded = true
}

// alloc reserves a block of at least n bytes and tells what the commit has to do for it.
func (h *heap) alloc(n uint64) (allocOp, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	class, small := h.r.classOf(n)
	if !small {
		return h.allocLarge(n)
	}
	for {
		list := h.partial[class]
		if len(list) == 0 {
			if err := h.newRun(class); err != nil {
				return allocOp{}, err
			}
			continue
		}
		ru := list[len(list)-1]
		h.load(ru)
		if ru.nfree == 0 {
			ru.listed = false
			h.partial[class] = list[:len(list)-1]
			continue
		}
		for ru.used[ru.hint] == ^uint64(0) {
			ru.hint = (ru.hint + 1) % len(ru.used)
		}
		bit := bits.TrailingZeros64(^ru.used[ru.hint])
		ru.used[ru.hint] |= 1 << bit
		ru.nfree--
		size := uint64(classSizes[class])
		base := h.r.chunk(ru.chunk)
		return allocOp{op: opSet, at: base + 8*uint64(ru.hint), val: 1 << bit, run: ru, n: size,
			block: Off(base + h.r.bitmap() + size*uint64(64*ru.hint+bit))}, nil
	}
}

// newRun turns a free chunk into a run, outside any transaction: a run without blocks is not a leak, and others may take blocks from it before the
// transaction that needed it ends.
func (h *heap) newRun(class uint8) error {
	c, err := h.take(1, h.r.runEntries(class))
	if err != nil {
		return err
	}
	m := h.r.mem
	m.Zero(h.r.chunk(c), h.r.bitmap())
	m.Flush(h.r.chunk(c), h.r.bitmap())
	if err := m.Fence(); err != nil {
		return err
	}
	m.Store64(h.r.word(c), chunkWord(chunkRun, class, 0))
	m.Flush(h.r.word(c), 8)
	if err := m.Fence(); err != nil {
		return err
	}
	h.kind[c] = memRun
	h.addRun(c, class)
	return nil
}

func (h *heap) allocLarge(n uint64) (allocOp, error) {
	if n > h.r.size {
		return allocOp{}, fmt.Errorf("allocate %d bytes: %w", n, ErrFull)
	}
	count := uint32((n + uint64(h.r.chunkSize) - 1) / uint64(h.r.chunkSize))
	c, err := h.take(count, tableEntry)
	if err != nil {
		return allocOp{}, err
	}
	h.entries += tableEntry
	return allocOp{op: opUndo, at: h.r.word(c), val: chunkWord(chunkLarge, 0, count), block: Off(h.r.chunk(c)),
		n: uint64(count) * uint64(h.r.chunkSize), chunks: count}, nil
}

// take reserves count free chunks in a row. With what becomes of them the log needs grow bytes of entries more.
func (h *heap) take(count uint32, grow uint64) (uint32, error) {
	for pass := range 2 {
		if h.available(count, grow) {
			for _, from := range []uint32{h.hint, 0} {
				if c, ok := h.find(from, count); ok {
					for i := c; i < c+count; i++ {
						h.kind[i] = memReserved
					}
					h.free -= count
					h.hint = c + count
					return c, nil
				}
			}
		}
		if pass == 0 {
			if err := h.reclaim(); err != nil {
				return 0, err
			}
		}
	}
	chunk := uint64(h.r.chunkSize)
	return 0, fmt.Errorf("no %d free bytes in a row, beside %d that are kept for the log of commits: %w", uint64(count)*chunk, uint64(h.keep(grow))*chunk, ErrFull)
}

func (h *heap) find(from, count uint32) (uint32, bool) {
	row := uint32(0)
	for c := from; c < uint32(len(h.kind)); c++ {
		if h.kind[c] != memFree {
			row = 0
		} else if row++; row == count {
			return c + 1 - count, true
		}
	}
	return 0, false
}

// reclaim frees runs in which nothing is allocated or reserved.
func (h *heap) reclaim() error {
	n := 0
	for c, ru := range h.runs {
		if h.load(ru); ru.nfree != h.r.blocks(ru.class) {
			continue
		}
		h.r.mem.Store64(h.r.word(c), 0)
		h.r.mem.Flush(h.r.word(c), 8)
		delete(h.runs, c)
		h.entries -= h.r.runEntries(ru.class)
		list := h.partial[ru.class][:0]
		for _, o := range h.partial[ru.class] {
			if o != ru {
				list = append(list, o)
			}
		}
		h.partial[ru.class] = list
		h.kind[c] = memFree
		h.free++
		n++
	}
	if n == 0 {
		return nil
	}
	return h.r.mem.Fence() // before the chunk becomes data: the word must not say "run" then
}

// release takes a reservation or an allocation back, in memory. The claim of who frees goes in the same moment: the next to have the block may free
// it at once.
func (h *heap) release(op *allocOp) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if op.freeable {
		delete(h.freeing, op.block)
	}
	if op.run == nil {
		h.releaseChunks(op)
		h.entries -= tableEntry
		return
	}
	ru := op.run
	i := (op.at - h.r.chunk(ru.chunk)) / 8
	if ru.used[i]&op.val == 0 {
		return
	}
	ru.used[i] &^= op.val
	ru.nfree++
	if !ru.listed {
		ru.listed = true
		h.partial[ru.class] = append(h.partial[ru.class], ru)
	}
}

// settle marks a large block as allocated, in memory.
func (h *heap) settle(op *allocOp) {
	if op.run != nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.r.chunkOf(uint64(op.block))
	h.kind[c] = memLarge
	for i := c + 1; i < c+op.chunks; i++ {
		h.kind[i] = memTail
	}
}

// block describes the allocated block that starts at off. onMedium tells whether it is allocated there already.
func (h *heap) block(off Off) (op allocOp, err error) {
	bad := fmt.Errorf("offset %d: %w", uint64(off), ErrFree)
	if !h.r.inHeap(uint64(off), 1) {
		return op, bad
	}
	c := h.r.chunkOf(uint64(off))
	base := h.r.chunk(c)
	switch h.kind[c] {
	case memLarge:
		w := h.r.mem.Load64(h.r.word(c))
		if uint64(off) != base || uint8(w) != chunkLarge {
			return op, bad
		}
		count := uint32(w >> 32)
		if count == 0 || count > h.r.chunkCount-c {
			return op, fmt.Errorf("%w: chunk table, word %d", ErrCorrupt, c)
		}
		return allocOp{op: opUndo, at: h.r.word(c), old: w, block: off, chunks: count, n: uint64(count) * uint64(h.r.chunkSize)}, nil
	case memRun:
		ru := h.runs[c]
		h.load(ru)
		size := uint64(classSizes[ru.class])
		at := uint64(off) - base
		if at < h.r.bitmap() || (at-h.r.bitmap())%size != 0 {
			return op, bad
		}
		i := (at - h.r.bitmap()) / size
		op = allocOp{op: opClear, at: base + 8*(i/64), val: 1 << (i % 64), block: off, run: ru, n: size}
		if i >= uint64(h.r.blocks(ru.class)) || h.r.mem.Load64(op.at)&op.val == 0 {
			return op, bad
		}
		return op, nil
	}
	return op, bad
}

// startFree finds an allocated block and claims it for the caller's transaction.
func (h *heap) startFree(off Off) (allocOp, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	op, err := h.block(off)
	if err != nil {
		return op, err
	}
	if _, twice := h.freeing[off]; twice {
		return op, fmt.Errorf("offset %d is being freed already: %w", uint64(off), ErrFree)
	}
	h.freeing[off] = struct{}{}
	op.freeable = true
	return op, nil
}

// endFree gives the claim back: the block stays.
func (h *heap) endFree(off Off) {
	h.mu.Lock()
	delete(h.freeing, off)
	h.mu.Unlock()
}

// Block is an allocated block.
type Block struct {
	Off  Off
	Size uint64 // usable bytes
}

// Blocks calls fn for every block that is allocated on the medium, in order of offset. No transaction may run meanwhile.
func (r *Region) Blocks(fn func(Block) bool) {
	r.heap.mu.Lock()
	defer r.heap.mu.Unlock()
	for c := uint32(0); c < r.chunkCount; c++ {
		w := r.mem.Load64(r.word(c))
		switch uint8(w) {
		case chunkLarge:
			if !fn(Block{Off(r.chunk(c)), (w >> 32) * uint64(r.chunkSize)}) {
				return
			}
		case chunkRun:
			class := uint8(w >> 8)
			if int(class) >= len(classSizes) {
				continue
			}
			for i := range uint64(r.blocks(class)) {
				if r.mem.Load64(r.chunk(c)+8*(i/64))>>(i%64)&1 == 1 &&
					!fn(Block{Off(r.chunk(c) + r.bitmap() + i*uint64(classSizes[class])), uint64(classSizes[class])}) {
					return
				}
			}
		}
	}
}
