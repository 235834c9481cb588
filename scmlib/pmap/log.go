// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"fmt"
	"hash/crc32"
	"iter"
	"unsafe"

	"github.com/nhybrid/nhybrid/scmlib"
)

// LogHead is the persistent part of a log.
type LogHead struct {
	first, last scmlib.Off // segments
	end         uint64     // bytes used of the last segment
	next        uint64     // sequence number of the next record
}

// segment is followed by size bytes of records: u32 length, u32 CRC-32C, the bytes, padding to 8.
type segment struct {
	next  scmlib.Off
	size  uint64
	start uint64 // sequence number of the first record
	used  uint64 // bytes, once there is a next segment
}

// Log is a row of records that grows at its end and is cut at its start. An append writes where nothing is yet, so only the head is undone.
type Log struct {
	r    *scmlib.Region
	head scmlib.Ptr[LogHead]
}

const (
	segSize = 16 << 10
	segHead = uint64(unsafe.Sizeof(segment{}))
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// NewLog binds a head to its region.
func NewLog(r *scmlib.Region, head scmlib.Ptr[LogHead]) *Log { return &Log{r, head} }

// Next is the sequence number that the next record will have. The first has 0.
func (l *Log) Next() uint64 { return l.head.In(l.r).next }

// Append adds a record.
func (l *Log) Append(tx *scmlib.Tx, b []byte) error {
	if len(b) > MaxBytes {
		return scmlib.ErrFull
	}
	h := l.head.In(l.r)
	need := 8 + (uint64(len(b))+7)&^7
	if h.last == 0 || h.end+need > at[segment](l.r, h.last).size {
		size := max(segSize-segHead, need)
		off, err := tx.Alloc(segHead + size)
		if err != nil {
			return err
		}
		*at[segment](l.r, off) = segment{size: size, start: h.next}
		if h.last == 0 {
			err = scmlib.AddAll(tx, h)
			h.first = off
		} else {
			last := at[segment](l.r, h.last)
			err = tx.Add(h, &last.next, &last.used)
			last.next, last.used = off, h.end
		}
		if err != nil {
			return err
		}
		h.last, h.end = off, 0
	} else if err := scmlib.AddAll(tx, &h.end, &h.next); err != nil {
		return err
	}
	place := h.last + scmlib.Off(segHead+h.end)
	if err := tx.Dirty(place, need); err != nil {
		return err
	}
	*at[uint64](l.r, place) = uint64(len(b)) | uint64(crc32.Checksum(b, castagnoli))<<32
	copy(ptr[byte](place+8).Slice(l.r, len(b)), b)
	h.end += need
	h.next++
	return nil
}

// From lists the records whose sequence number is at least seq. The slices lie in the region and must not be written. It ends at a record whose checksum is wrong;
// check Err of the returned cursor.
func (l *Log) From(seq uint64) *Cursor { return &Cursor{l: l, seq: seq} }

// Cursor reads a log.
type Cursor struct {
	l   *Log
	seq uint64
	err error
}

// Err is why All ended early: a record that the medium has lost.
func (c *Cursor) Err() error { return c.err }

// All lists the records. The log must not change meanwhile.
func (c *Cursor) All() iter.Seq2[uint64, []byte] {
	return func(yield func(uint64, []byte) bool) {
		h := c.l.head.In(c.l.r)
		for off := h.first; off != 0; {
			s := at[segment](c.l.r, off)
			end := s.used
			if off == h.last {
				end = h.end
			}
			if end > s.size {
				panic(&scmlib.PtrError{Off: off, Size: end})
			}
			for pos, seq := uint64(0), s.start; pos < end; seq++ {
				place := off + scmlib.Off(segHead+pos)
				w := *at[uint64](c.l.r, place)
				n := w & 0xffffffff
				if n > end-pos-8 {
					c.err = fmt.Errorf("log record %d at %d: length %d: %w", seq, uint64(place), n, scmlib.ErrCorrupt)
					return
				}
				pos += 8 + (n+7)&^7
				if seq < c.seq {
					continue
				}
				b := ptr[byte](place+8).Slice(c.l.r, int(n))
				if uint32(w>>32) != crc32.Checksum(b, castagnoli) {
					c.err = fmt.Errorf("log record %d at %d: checksum: %w", seq, uint64(place), scmlib.ErrCorrupt)
					return
				}
				if !yield(seq, b) {
					return
				}
			}
			if off == h.last {
				return
			}
			off = s.next
		}
	}
}

// Trim gives segments back that hold only records before seq. Some records before seq may stay.
func (l *Log) Trim(tx *scmlib.Tx, seq uint64) error {
	h := l.head.In(l.r)
	first := h.first
	for first != 0 && first != h.last {
		s := at[segment](l.r, first)
		if at[segment](l.r, s.next).start > seq {
			break
		}
		if err := tx.Free(first); err != nil {
			return err
		}
		first = s.next
	}
	if first == h.first {
		return nil
	}
	return scmlib.Set(tx, &h.first, first)
}
