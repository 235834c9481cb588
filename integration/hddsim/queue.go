// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"sync"
	"time"
)

// batch is how many requests of one sequential stream are served in a row while others wait, as fifo_batch of the
// kernel's mq-deadline.
const batch = 16

type operation int

const (
	read operation = iota
	write
	flush
)

// request is one that waits for the head or is being served.
type request struct {
	op      operation
	off, n  int64
	arrived time.Time
	done    chan struct{}
}

// queue is the command queue of the disk. The kernel hands one sequential write to the FUSE server as several requests
// at a time, on several threads, so they arrive out of order. A head that takes them as they come seeks between the
// pieces of one stream: 150 times in 100 MB. A real disk does not, since its elevator and its own queue order them.
type queue struct {
	head head

	mu      sync.Mutex
	waiting []*request // oldest first
	serving bool
	run     int // requests of one stream in a row
}

// submit puts a request into the queue; it is served when done of it is closed. Whoever calls it does so before all
// other work of the request, so that little time is left for another to overtake. Safe for concurrent use.
func (q *queue) submit(op operation, off, n int64) *request {
	r := &request{op: op, off: off, n: n, arrived: time.Now(), done: make(chan struct{})}
	if q.head.free() {
		close(r.done)
		return r
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, r)
	if !q.serving {
		q.serving = true
		go q.serve()
	}
	return r
}

// serve serves until nothing waits.
func (q *queue) serve() {
	for {
		q.mu.Lock()
		if len(q.waiting) == 0 {
			q.serving = false
			q.mu.Unlock()
			return
		}
		i, follows := next(q.waiting, q.head.position(), q.head.gap(), q.run)
		r := q.waiting[i]
		q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
		q.run++
		if !follows {
			q.run = 0
		}
		q.mu.Unlock()
		// A request that had to wait arrived before the head was idle, so what the sleep below oversleeps is not lost.
		waitUntil(q.head.serve(r))
		close(r.done)
	}
}

// next chooses the request that the head, which stands at pos, serves: the nearest one within gap ahead, at most batch
// of them in a row, else the oldest. follows reports whether it continues the stream.
func next(waiting []*request, pos, gap int64, run int) (index int, follows bool) {
	nearest := gap + 1
	for i, r := range waiting {
		if distance := r.off - pos; r.op != flush && distance >= 0 && distance < nearest {
			index, nearest, follows = i, distance, true
		}
	}
	if follows && run >= batch && index != 0 {
		return 0, false
	}
	return index, follows
}
