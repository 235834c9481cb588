// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"sync"
	"time"
)

// Model is the timing of a disk with one actuator and a track buffer. The zero value costs nothing.
type Model struct {
	// ReadSeek and WriteSeek are the cost of a request that does not follow the one before it. Writes cost less: the
	// drive's cache and elevator order them.
	ReadSeek  time.Duration `json:"readSeek"`
	WriteSeek time.Duration `json:"writeSeek"`
	// ReadRate and WriteRate are the transfer rates in bytes a second; 0: no cost.
	ReadRate  float64 `json:"readRate"`
	WriteRate float64 `json:"writeRate"`
	// Flush is the cost of a cache flush after something was written.
	Flush time.Duration `json:"flush"`
	// Gap is the longest distance forward, in bytes, that passes below the head rather than being sought. It is
	// charged at the transfer rate.
	Gap int64 `json:"gap"`
}

// HDD is a 7200 rpm disk: 150 MB/s, about 120 random reads a second.
func HDD() Model {
	return Model{
		ReadSeek: 8 * time.Millisecond, WriteSeek: 4 * time.Millisecond, Flush: 8 * time.Millisecond,
		ReadRate: 150e6, WriteRate: 140e6, Gap: 1 << 20,
	}
}

// streamPause is how long a sequential stream may pause without losing a rotation: the track buffer reads ahead.
const streamPause = 20 * time.Millisecond

// head is the state of the actuator: one request after the other.
type head struct {
	mu    sync.Mutex
	model Model
	pos   int64 // the byte after the last request
	// passed are the last gaps that passed below the head, and were charged for.
	passed []extent
	busy   time.Time // when the last request ends
	dirty  bool      // written since the last flush
	seeks  int64
}

func (h *head) setModel(m Model) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.model = m
}

type extent struct{ off, end int64 }

// passedMax is how many requests the kernel has under way at a FUSE server (max_background): one that falls into a gap
// which this many others have left has been overtaken by them.
const passedMax = 12

// free reports whether nothing costs anything.
func (h *head) free() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.model == (Model{})
}

func (h *head) position() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pos
}

func (h *head) gap() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.model.Gap
}

func (h *head) seekCount() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seeks
}

// serve returns when the request is done.
func (h *head) serve(r *request) time.Time {
	switch r.op {
	case read:
		return h.read(r.arrived, r.off, r.n)
	case write:
		return h.write(r.arrived, r.off, r.n)
	default:
		return h.flush(r.arrived)
	}
}

// read returns when a read that arrives at now is done.
func (h *head) read(now time.Time, off, n int64) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.transfer(now, off, n, h.model.ReadRate, h.model.ReadSeek)
}

// write returns when a write that arrives at now is done.
func (h *head) write(now time.Time, off, n int64) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dirty = true
	return h.transfer(now, off, n, h.model.WriteRate, h.model.WriteSeek)
}

// flush returns when a cache flush that arrives at now is done.
func (h *head) flush(now time.Time) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.dirty {
		return now
	}
	h.dirty = false
	if h.busy.Before(now) {
		h.busy = now
	}
	h.busy = h.busy.Add(h.model.Flush)
	return h.busy
}

// overtaken reports whether the range lies in a gap that the head has just passed over. The kernel issues the requests
// of a stream in order; threads of the server overtake each other, above all when the machine is busy.
func (h *head) overtaken(off, end int64) bool {
	for i, p := range h.passed {
		if p.off <= off && end <= p.end {
			h.passed = append(h.passed[:i], h.passed[i+1:]...)
			for _, rest := range []extent{{p.off, off}, {end, p.end}} {
				if rest.off < rest.end {
					h.passed = append(h.passed, rest)
				}
			}
			return true
		}
	}
	return false
}

// transfer is called with h.mu held.
func (h *head) transfer(now time.Time, off, n int64, rate float64, seek time.Duration) time.Time {
	if h.overtaken(off, off+n) {
		if h.busy.Before(now) {
			h.busy = now
		}
		return h.busy
	}
	distance := off - h.pos
	sequential := distance >= 0 && distance <= h.model.Gap
	h.pos = off + n
	var cost time.Duration
	if sequential {
		if distance > 0 {
			h.passed = append(h.passed[max(0, len(h.passed)+1-passedMax):], extent{off - distance, off})
		}
		n += distance
	} else {
		cost = seek
		h.seeks++
	}
	if rate > 0 {
		cost += time.Duration(float64(n) / rate * float64(time.Second))
	}
	if h.busy.Before(now) && (!sequential || now.Sub(h.busy) >= streamPause) {
		h.busy = now
	}
	h.busy = h.busy.Add(cost)
	return h.busy
}
