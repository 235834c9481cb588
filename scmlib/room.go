// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"cmp"
	"slices"
)

// Room for the log of allocations and frees.
//
// To free blocks needs log entries, and must not fail because the region is full. So the allocator keeps back as many chunks as the log of the largest commit
// takes: one that frees every block, or has a word of every bitmap both set and cleared. Only the commit may use them, and one commit at a time: it has then all
// it needs and waits for nothing. Add is no part of this: what it logs has no bound, and while the function of Update runs it may wait for other transactions.
//
// Small heaps need no chunk for it: a part at the end of each lane is kept for the commit.

const (
	wordEntries = 2 * 16 // bytes of the log: one SET and one CLEAR for a word of a bitmap
	tableEntry  = 16 + 8 // one UNDO for a word of the chunk table
	maxTail     = 1 << 10
	tailHead    = recHead + (line - 1) + linkRoom // what of the tail is not entries
)

// room tells how much is kept back. Its numbers follow from the geometry.
type room struct {
	tail    uint64 // bytes at the end of a segment of the log that only the commit uses
	entries uint64 // bytes of entries for which the tail is enough
	record  uint64 // least bytes of entries in a record that is full
	records uint64 // such records that a chunk holds
}

// maxRecord is how long a record may be.
func (g *geometry) maxRecord() uint64 { return min(uint64(g.laneSize)-2*line, 8<<10) }

func (g *geometry) room() room {
	all := uint64(g.chunkCount) * max(wordEntries*(g.bitmap()/8), tableEntry)
	w := room{tail: min(alignUp(all+tailHead, line), uint64(g.laneSize)/2&^(line-1), maxTail)}
	if w.tail <= tailHead {
		w.tail = 0
	} else {
		w.entries = w.tail - tailHead
	}
	w.record = g.maxRecord() - 64
	w.records = (uint64(g.chunkSize) - linkRoom) / alignUp(g.maxRecord(), line)
	return w
}

// chunks is how many are kept back for so many bytes of entries.
func (w room) chunks(entries uint64) uint32 {
	if entries <= w.entries {
		return 0
	}
	return uint32((entries/w.record + w.records) / w.records)
}

// runEntries is how many bytes of the log a commit needs for a run of a class.
func (g *geometry) runEntries(class uint8) uint64 {
	return wordEntries * uint64((g.blocks(class)+63)/64)
}

// keep is how many chunks are kept back if the log needs grow bytes of entries more than now. h.mu is held.
func (h *heap) keep(grow uint64) uint32 { return h.room.chunks(h.entries + grow) }

// available tells whether count chunks may be taken for data, or for a log that is not that of a commit. What a commit has borrowed comes back. h.mu is held.
func (h *heap) available(count uint32, grow uint64) bool {
	return h.free >= count && uint64(h.free)+uint64(h.lent) >= uint64(count)+uint64(h.keep(grow))
}

// segment reserves a chunk in which the log goes on. That of a commit may have one of those that are kept back.
func (t *Tx) segment(commit bool) (uint32, error) {
	h := t.r.heap
	h.mu.Lock()
	c, err := h.take(1, 0)
	h.mu.Unlock()
	if err == nil || !commit {
		return c, err
	}
	if !t.borrows {
		h.borrowing.Lock()
		t.borrows = true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c, ok := h.find(0, 1); ok {
		h.kind[c] = memReserved
		h.free--
		h.lent++
		t.lent++
		return c, nil
	}
	return 0, err // a region that was filled by a version of this library that kept nothing back
}

// dropExt gives back the chunks that the log has taken.
func (t *Tx) dropExt() {
	h := t.r.heap
	h.mu.Lock()
	for i := range t.ext {
		h.releaseChunks(&t.ext[i])
	}
	h.lent -= t.lent
	h.mu.Unlock()
	t.ext, t.lent = t.ext[:0], 0
	t.endBorrow()
}

// endBorrow lets the next commit have what is kept back.
func (t *Tx) endBorrow() {
	if t.borrows {
		t.borrows = false
		t.r.heap.borrowing.Unlock()
	}
}

// releaseChunks makes chunks free. h.mu is held.
func (h *heap) releaseChunks(op *allocOp) {
	c := h.r.chunkOf(uint64(op.block))
	for i := c; i < c+op.chunks; i++ {
		h.kind[i] = memFree
	}
	h.free += op.chunks
	h.hint = min(h.hint, c)
}

// wordOp is what is logged for all allocations or all frees of one word.
type wordOp struct {
	at, mask uint64
	op       uint8
}

// mergeOps appends what has to be logged for ops to dst: one entry for each word and kind.
func mergeOps(dst []wordOp, ops []allocOp) []wordOp {
	for i := range ops {
		if op := &ops[i]; !op.undone {
			dst = append(dst, wordOp{op.at, op.val, op.op})
		}
	}
	slices.SortFunc(dst, func(a, b wordOp) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.op, b.op)) })
	n := 0
	for _, w := range dst {
		if n > 0 && dst[n-1].at == w.at && dst[n-1].op == w.op {
			dst[n-1].mask |= w.mask
			continue
		}
		dst[n] = w
		n++
	}
	return dst[:n]
}
