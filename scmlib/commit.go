// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import "fmt"

// covered tells whether a range was added or allocated before, as far as the last few spans tell.
func (t *Tx) covered(s span) bool {
	for i := len(t.spans) - 1; i >= max(0, len(t.spans)-16); i-- {
		if p := t.spans[i]; s.off >= p.off && s.off+s.n <= p.off+p.n {
			return true
		}
	}
	return false
}

// log writes the old content of the ranges, and allocations that are not logged yet as far as they fit, and makes it durable: one fence. If it fails nothing more
// may be changed than before.
func (t *Tx) log(ss []span) (err error) {
	if !t.live {
		return ErrTxDone
	}
	for _, s := range ss {
		if s.n > 0 && !t.r.undoable(s.off, s.n) {
			return fmt.Errorf("range of %d bytes at %d: %w", s.n, s.off, ErrRange)
		}
	}
	logged, spans := t.logged, len(t.spans)
	defer func() {
		if err != nil {
			t.logged, t.spans = logged, t.spans[:spans]
			t.count, t.buf = 0, beginRecord(t.buf)
		}
	}()
	t.logSomeOps()
	for _, s := range ss {
		if s.n == 0 || t.covered(s) {
			continue
		}
		t.spans = append(t.spans, s)
		for s.n > 0 {
			if t.maxBuf-len(t.buf) < 32 {
				if err := t.emit(false); err != nil {
					return err
				}
			}
			k := min(s.n, uint64(t.maxBuf-len(t.buf)-16)&^7)
			t.buf = appendEntry(t.buf, opUndo, s.off, k, t.r.mem.Bytes(s.off, k))
			t.count++
			s.off, s.n = s.off+k, s.n-k
		}
	}
	return t.settleLog(false)
}

// logSomeOps puts allocations and frees into the record in the making where that spares the commit a record and a fence, and takes no room that it needs. Others
// it leaves to the commit, which has room for them in any case.
func (t *Tx) logSomeOps() {
	most := uint64(len(t.ops)-t.logged) * tableEntry
	if len(t.buf)+int(most) > t.maxBuf-32 || t.end-t.pos < alignUp(recHead+most, line)+linkRoom+t.r.heap.room.tail {
		return
	}
	t.words = mergeOps(t.words[:0], t.ops[t.logged:])
	for _, w := range t.words {
		t.appendOp(w)
	}
	t.logged = len(t.ops)
}

func (t *Tx) appendOp(w wordOp) {
	if w.op == opUndo {
		t.buf = appendEntry(t.buf, opUndo, w.at, 8, t.r.mem.Bytes(w.at, 8))
	} else {
		t.buf = appendEntry(t.buf, w.op, w.at, w.mask, nil)
	}
	t.count++
}

// logOps logs all allocations and frees that are not logged yet. It is part of the commit.
func (t *Tx) logOps() error {
	t.words = mergeOps(t.words[:0], t.ops[t.logged:])
	for _, w := range t.words {
		if t.maxBuf-len(t.buf) < 32 {
			if err := t.emit(true); err != nil {
				return err
			}
		}
		t.appendOp(w)
	}
	t.logged = len(t.ops)
	return t.settleLog(true)
}

// settleLog makes the log durable. Only then may what it protects be changed.
func (t *Tx) settleLog(commit bool) error {
	if t.count == 0 {
		return nil
	}
	if err := t.emit(commit); err != nil {
		return err
	}
	return t.r.fence()
}

// emit writes and flushes the record in the making. A log that has no room goes on in a chunk of the heap. That is reserved in memory only: after a crash it is
// free, and recovery has read it before anybody can have it. Only the commit uses the tail of a segment.
func (t *Tx) emit(commit bool) error {
	m := t.r.mem
	need := alignUp(uint64(len(t.buf)), line) + linkRoom
	if !commit {
		need += t.r.heap.room.tail
	}
	if t.end-t.pos < need {
		c, err := t.segment(commit)
		if err != nil {
			return fmt.Errorf("undo log: change or free less in one transaction, or enlarge the region: %w", err)
		}
		n := uint64(t.r.chunkSize)
		t.ext = append(t.ext, allocOp{block: Off(t.r.chunk(c)), chunks: 1})
		var space [linkRoom]byte
		link := appendEntry(beginRecord(space[:0]), opLink, t.r.chunk(c), n, nil)
		endRecord(link, t.gen, t.seq, 1, t.salt)
		m.Copy(t.pos, link)
		m.Flush(t.pos, uint64(len(link)))
		t.seq++
		t.pos, t.end = t.r.chunk(c), t.r.chunk(c)+n
	}
	endRecord(t.buf, t.gen, t.seq, t.count, t.salt)
	m.Copy(t.pos, t.buf)
	m.Flush(t.pos, uint64(len(t.buf)))
	t.pos += alignUp(uint64(len(t.buf)), line)
	t.seq++
	t.count, t.buf = 0, beginRecord(t.buf)
	return nil
}

func (t *Tx) commit() error {
	if err := t.settleOps(); err != nil {
		rerr := t.rollback()
		if rerr != nil {
			return fmt.Errorf("%w; roll back: %w", err, rerr)
		}
		return err
	}
	t.live = false
	m := t.r.mem
	last := ^uint64(0)
	for _, s := range t.spans {
		// Neighbours in one line are flushed once.
		if from, to := s.off/line, (s.off+s.n-1)/line; from != to || from != last {
			m.Flush(s.off, s.n)
			last = to
		}
	}
	if len(t.spans) > 0 || len(t.ops) > 0 {
		if err := t.r.fence(); err != nil {
			return err
		}
	}
	if err := t.voidLog(); err != nil {
		return err
	}
	for i := range t.ops {
		switch op := &t.ops[i]; {
		case op.freeable, op.undone:
			t.r.heap.release(op)
		default:
			t.r.heap.settle(op)
		}
	}
	t.dropExt()
	return nil
}

// settleOps logs what is not logged, and carries allocations and frees out.
func (t *Tx) settleOps() error {
	if len(t.ops) == 0 {
		return nil
	}
	if t.logged < len(t.ops) {
		if err := t.logOps(); err != nil {
			return err
		}
	}
	m := t.r.mem
	for i := range t.ops {
		op := &t.ops[i]
		if op.undone {
			continue
		}
		switch op.op {
		case opUndo:
			m.Store64(op.at, op.val)
		case opSet:
			m.Or64(op.at, op.val)
		case opClear:
			m.AndNot64(op.at, op.val)
		}
		m.Flush(op.at, 8)
	}
	return nil
}

// voidLog makes all records of this transaction invalid: one word, one line.
func (t *Tx) voidLog() error {
	if t.seq == 0 {
		return nil
	}
	at := t.r.lane(t.lane)
	t.r.mem.Store64(at, t.gen+1)
	t.r.mem.Flush(at, 8)
	return t.r.fence()
}

// rollback takes everything back, from the log on the medium, by the code that recovery uses.
func (t *Tx) rollback() error {
	t.live = false
	es, err := t.r.readLane(t.lane)
	if err != nil {
		return t.r.fail(err)
	}
	if len(es) > 0 {
		t.r.undo(es)
		if err := t.r.fence(); err != nil {
			return err
		}
	}
	if err := t.voidLog(); err != nil {
		return err
	}
	for i := range t.ops {
		if op := &t.ops[i]; op.freeable {
			t.r.heap.endFree(op.block)
		} else {
			t.r.heap.release(op)
		}
	}
	t.dropExt()
	return nil
}
