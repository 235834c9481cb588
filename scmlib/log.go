// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"hash/crc32"
	"slices"
)

// Entries of the undo log. docs/scm.md, "Lanes".
const (
	opUndo  = 1
	opSet   = 2
	opClear = 3
	opLink  = 4

	recHead  = 32
	linkRoom = line // for a record with one LINK
	offMask  = 1<<56 - 1
)

type span struct{ off, n uint64 }

// entry is one step of the log as recovery reads it. For opUndo, at is where the payload stands on the medium.
type entry struct {
	op      uint8
	off     uint64
	arg     uint64
	payload []byte
}

// salt ties a record to its region and lane: the log of another region, copied to the same place, is not valid here.
func salt(uuid *[16]byte, lane uint32) uint64 { return le.Uint64(uuid[:8]) ^ uint64(lane) }

// beginRecord leaves room for the head.
func beginRecord(b []byte) []byte { return append(b[:0], make([]byte, recHead)...) }

func appendEntry(b []byte, op uint8, off, arg uint64, payload []byte) []byte {
	b = le.AppendUint64(b, uint64(op)<<56|off)
	b = le.AppendUint64(b, arg)
	b = append(b, payload...)
	var pad [8]byte
	return append(b, pad[:-len(payload)&7]...)
}

// endRecord fills in the head.
func endRecord(b []byte, gen uint64, seq, count uint32, salt uint64) {
	le.PutUint32(b[4:], uint32(len(b)))
	le.PutUint64(b[8:], gen)
	le.PutUint32(b[16:], seq)
	le.PutUint32(b[20:], count)
	le.PutUint64(b[24:], salt)
	le.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
}

// readLane returns the entries of all valid records of a lane, in order. It reads, and changes nothing. An error means that a record has a
// right checksum and a content that this format does not allow: not the trace of a crash, but damage or malice.
func (r *Region) readLane(lane uint32) ([]entry, error) {
	base := r.lane(lane)
	gen := r.mem.Load64(base)
	pos, end := base+line, base+uint64(r.laneSize)
	var out []entry
	for seq := uint32(0); pos < end && end-pos >= line; seq++ { // a hostile link may have led pos past end
		n := uint64(le.Uint32(r.mem.Bytes(pos+4, 4)))
		if n < recHead || n > end-pos {
			break
		}
		b := slices.Clone(r.mem.Bytes(pos, n)) // once: the owner of a hostile region must not change it between check and use
		if uint64(le.Uint32(b[4:])) != n || le.Uint64(b[8:]) != gen || le.Uint32(b[16:]) != seq || le.Uint64(b[24:]) != salt(&r.hdr.uuid, lane) ||
			!r.mem.Verify(le.Uint32(b) == crc32.Checksum(b[4:], castagnoli)) {
			break
		}
		es, err := r.readEntries(b[recHead:], le.Uint32(b[20:]))
		if err != nil {
			return nil, fmt.Errorf("%w: lane %d, record %d at %d: %w", ErrCorrupt, lane, seq, pos, err)
		}
		pos += alignUp(n, line)
		if k := len(es); k > 0 && es[k-1].op == opLink {
			pos, end = es[k-1].off, es[k-1].off+es[k-1].arg
			es = es[:k-1]
		}
		out = append(out, es...)
	}
	return out, nil
}

func (r *Region) readEntries(b []byte, count uint32) ([]entry, error) {
	var es []entry
	for i := range count {
		if len(b) < 16 {
			return nil, fmt.Errorf("entry %d of %d is cut", i, count)
		}
		w := le.Uint64(b)
		e := entry{op: uint8(w >> 56), off: w & offMask, arg: le.Uint64(b[8:])}
		b = b[16:]
		ok := false
		switch e.op {
		case opUndo:
			if e.arg == 0 || e.arg > uint64(len(b)) {
				return nil, fmt.Errorf("entry %d: payload of %d bytes is cut", i, e.arg)
			}
			e.payload, b = b[:e.arg], b[min(alignUp(e.arg, 8), uint64(len(b))):]
			ok = r.undoable(e.off, e.arg)
		case opSet, opClear:
			ok = e.off%8 == 0 && r.inHeap(e.off, 8) && (e.off-r.heapOff)%uint64(r.chunkSize) < r.bitmap()
		case opLink:
			ok = i == count-1 && e.off%line == 0 && e.arg >= 2*line && r.inHeap(e.off, e.arg)
		}
		if !ok {
			return nil, fmt.Errorf("entry %d: operation %d at %d, argument %d", i, e.op, e.off, e.arg)
		}
		es = append(es, e)
	}
	return es, nil
}

// undoable is where transactions may write: the root record, the chunk table, the heap.
func (r *Region) undoable(off, n uint64) bool {
	within := func(lo, hi uint64) bool { return off >= lo && n <= hi-lo && off <= hi-n }
	return within(rootAt, rootAt+line) || within(r.tableOff, r.tableOff+8*uint64(r.chunkCount)) || r.inHeap(off, n)
}

// undo takes back what the entries tell, last first, and flushes it. Doing it twice does no harm.
func (r *Region) undo(es []entry) {
	for _, e := range slices.Backward(es) {
		switch e.op {
		case opUndo:
			r.mem.Copy(e.off, e.payload)
			r.mem.Flush(e.off, e.arg)
		case opSet:
			r.mem.AndNot64(e.off, e.arg)
			r.mem.Flush(e.off, 8)
		case opClear:
			r.mem.Or64(e.off, e.arg)
			r.mem.Flush(e.off, 8)
		}
	}
}

// readLanes reads what a crash has left in all lanes, and the chunk table as it will be when that is rolled back. Nothing is written.
func (r *Region) readLanes() (lanes [][]entry, table []byte, err error) {
	lanes = make([][]entry, r.lanes)
	table = slices.Clone(r.mem.Bytes(r.tableOff, 8*uint64(r.chunkCount)))
	for i := range lanes {
		if lanes[i], err = r.readLane(uint32(i)); err != nil {
			return nil, nil, err
		}
		for _, e := range slices.Backward(lanes[i]) {
			if e.op == opUndo && e.off >= r.tableOff && e.off < r.tableOff+uint64(len(table)) {
				copy(table[e.off-r.tableOff:], e.payload)
			}
		}
	}
	return lanes, table, nil
}

// recoverLanes rolls back every transaction that a crash cut short, and returns how many. The new generations of the lanes are flushed but not yet
// fenced: the header that is written next does it.
func (r *Region) recoverLanes(lanes [][]entry) (int, error) {
	rolled := 0
	for _, es := range lanes {
		if len(es) > 0 {
			rolled++
			r.undo(es)
		}
	}
	if rolled > 0 {
		if err := r.mem.Fence(); err != nil {
			return 0, err
		}
	}
	for i := range r.lanes {
		at := r.lane(i)
		r.mem.Store64(at, r.mem.Load64(at)+1)
		r.mem.Flush(at, 8)
	}
	return rolled, nil
}
