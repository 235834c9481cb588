// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// executor does the steps that next asks for: one at a time for each layer, on a
// bounded number of workers. Steps that read and write at length on the HDD for
// nobody in particular have a worker of their own, in the idle class of the I/O
// schedulers that have one.
type executor struct {
	s     *Store
	ctx   context.Context
	stop  context.CancelFunc
	wg    sync.WaitGroup
	lanes [2]*lane

	waits atomic.Bool // a timer looks for the end of pulls and starts
}

// lane is a queue with its workers. A layer stands in it once.
type lane struct {
	mu     sync.Mutex
	cond   *sync.Cond
	queue  []LayerID
	queued map[LayerID]bool
	again  map[LayerID]bool // kicked while a worker is at it
	active map[LayerID]bool
	closed bool
}

const (
	work = iota // what somebody waits for, or what is short
	fill        // holes of packs
)

// retryFirst and retryMost bound the pause before a step that failed is tried again.
const (
	retryFirst = 2 * time.Second
	retryMost  = 5 * time.Minute
)

func newLane() *lane {
	l := &lane{queued: map[LayerID]bool{}, again: map[LayerID]bool{}, active: map[LayerID]bool{}}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func newExecutor(s *Store) *executor {
	e := &executor{s: s, lanes: [2]*lane{newLane(), newLane()}}
	e.ctx, e.stop = context.WithCancel(s.ctx)
	for range s.config.Workers {
		e.wg.Go(func() { e.serve(work) })
	}
	e.wg.Go(func() {
		// The I/O class belongs to the thread: this one is the filler's until it ends.
		runtime.LockOSThread()
		if err := setIdleIO(); err != nil {
			log.L.WithError(err).Debug("filling packs keeps its normal I/O priority")
		}
		e.serve(fill)
	})
	return e
}

// kick tells that there may be something to do for a layer.
func (e *executor) kick(id LayerID) { e.lanes[work].put(id, false) }

// hurry does the same, before all others.
func (e *executor) hurry(id LayerID) { e.lanes[work].put(id, true) }

// resume looks at all layers again that wait for traffic to end.
func (e *executor) resume() {
	for _, l := range e.s.Layers() {
		if l.State != Home || l.Damaged != "" {
			e.kick(l.ID)
		}
	}
}

// length is the number of layers that wait or are worked on.
func (e *executor) length() (n int) {
	for _, l := range e.lanes {
		l.mu.Lock()
		n += len(l.queue) + len(l.active)
		l.mu.Unlock()
	}
	return n
}

func (l *lane) put(id LayerID, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return
	case l.active[id]:
		l.again[id] = true
		return
	case l.queued[id] && !first:
		return
	case l.queued[id]:
		l.queue = slices.DeleteFunc(l.queue, func(q LayerID) bool { return q == id })
	}
	l.queued[id] = true
	if first {
		l.queue = slices.Insert(l.queue, 0, id)
	} else {
		l.queue = append(l.queue, id)
	}
	l.cond.Signal()
}

func (l *lane) take() (id LayerID, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) == 0 && !l.closed {
		l.cond.Wait()
	}
	if l.closed {
		return 0, false
	}
	id, l.queue = l.queue[0], l.queue[1:]
	delete(l.queued, id)
	l.active[id] = true
	return id, true
}

func (l *lane) done(id LayerID) {
	l.mu.Lock()
	again := l.again[id]
	delete(l.again, id)
	delete(l.active, id)
	l.mu.Unlock()
	if again {
		l.put(id, false)
	}
}

func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.cond.Broadcast()
}

func (e *executor) serve(which int) {
	for {
		id, ok := e.lanes[which].take()
		if !ok {
			return
		}
		e.advance(which, id)
		e.lanes[which].done(id)
	}
}

// advance does steps for a layer until there is none left for this lane.
func (e *executor) advance(which int, id LayerID) {
	l, err := e.s.layer(id)
	if err != nil || e.s.unpacking(l) {
		return // removed, or looked at again when the unpacking ends
	}
	if !e.begin(which, l) {
		return // looked at again when the other work on it ends
	}
	defer e.end(l, id)
	for e.ctx.Err() == nil {
		rec, err := e.s.Layer(id)
		if err != nil {
			return // removed
		}
		_, busy := e.s.Busy()
		found, err := e.s.found(l, rec)
		if err != nil {
			e.failed(l, id, Nothing, err)
			return
		}
		step, why := next(rec, found, busy)
		if step == Nothing {
			e.rest(l, id, rec)
			if busy && waiting(rec) {
				e.awaitTraffic()
			}
			return
		}
		if (step == Fill) != (which == fill) {
			if step == Fill {
				e.lanes[fill].put(id, false)
			} else {
				e.kick(id)
			}
			return
		}
		if step == Pack && e.s.awaitParents(l, rec) {
			return
		}
		log.L.WithFields(log.Fields{"layer": id, "step": step.String(), "why": why}).Debug("step")
		if err = e.s.perform(e.ctx, l, rec, step, why); err != nil {
			e.failed(l, id, step, err)
			return
		}
		e.s.mu.Lock()
		l.last, l.pause = nil, 0
		e.s.mu.Unlock()
	}
}

// begin takes the run lock of a layer. A worker does not wait for it: filling may take as long as pulls go on.
func (e *executor) begin(which int, l *layer) bool {
	if which == fill {
		l.run.Lock()
		return true
	}
	e.s.mu.Lock()
	l.refused = true // before the trial: who has the lock looks at this after giving it back
	e.s.mu.Unlock()
	if !l.run.TryLock() {
		return false
	}
	e.s.mu.Lock()
	l.refused = false
	e.s.mu.Unlock()
	return true
}

// end gives the run lock back and has the layer looked at by who was refused.
func (e *executor) end(l *layer, id LayerID) {
	l.run.Unlock()
	e.s.mu.Lock()
	refused := l.refused
	l.refused = false
	e.s.mu.Unlock()
	if refused {
		e.kick(id)
	}
}

// awaitParents reports whether layers below a directory that was committed cannot be read yet. No worker waits for them,
// since it takes one to mend them: the layer is looked at again when they can be read.
func (s *Store) awaitParents(l *layer, rec Layer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.awaits || !slices.ContainsFunc(rec.Parents, func(id LayerID) bool {
		parent := s.layers[id]
		return parent == nil || !parent.rec.readable()
	}) {
		return l.awaits
	}
	l.awaits = true
	s.wg.Go(func() {
		var err error
		for _, id := range rec.Parents {
			if _, err = s.Await(s.ctx, id); err != nil {
				err = fmt.Errorf("pack layer %s: %w", rec.ID, err)
				break
			}
		}
		s.mu.Lock()
		l.awaits = false
		s.mu.Unlock()
		if err != nil {
			s.exec.failed(l, rec.ID, Pack, err)
			return
		}
		s.exec.kick(rec.ID)
	})
	return true
}

// unpacking reports whether a layer is being unpacked, in which it must not be waited
// for: a blob may take long. An unpacking that nobody needs any more is told to end.
func (s *Store) unpacking(l *layer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.unpack == nil {
		return false
	}
	if l.rec.Users == 0 && l.holds <= 0 {
		l.unpack.end()
	}
	return true
}

// rest arranges for the look at a layer that nobody uses when its time is over.
func (e *executor) rest(l *layer, id LayerID, rec Layer) {
	e.s.mu.Lock()
	unused := rec.Users == 0 && l.holds == 0 && l.unpack == nil
	wait := e.s.config.Grace - time.Since(l.since)
	e.s.mu.Unlock()
	if unused {
		e.later(id, max(wait, 0)+time.Millisecond)
	}
}

// waiting reports whether a layer may have steps that wait for traffic to end.
func waiting(rec Layer) bool { return rec.State == Stored || rec.State == Durable }

// awaitTraffic looks now and then whether pulls and starts are over. A start ends
// when nothing is opened any more for a while: nobody tells of that.
func (e *executor) awaitTraffic() {
	if !e.waits.CompareAndSwap(false, true) {
		return
	}
	time.AfterFunc(yield, func() {
		e.waits.Store(false)
		switch _, busy := e.s.Busy(); {
		case e.ctx.Err() != nil:
		case busy:
			e.overdue()
			e.awaitTraffic()
		default:
			e.resume()
		}
	})
}

// overdue looks at layers that have waited long enough for traffic to end. What has failed has a time of its own.
func (e *executor) overdue() {
	e.s.mu.Lock()
	var ids []LayerID
	for id, l := range e.s.layers {
		if l.overdue() && l.last == nil {
			ids = append(ids, id)
		}
	}
	e.s.mu.Unlock()
	for _, id := range ids {
		e.kick(id)
	}
}

func (e *executor) failed(l *layer, id LayerID, step Step, err error) {
	if _, gone := e.s.Layer(id); e.ctx.Err() != nil || errdefs.IsNotFound(gone) {
		return // stopping, or removed meanwhile
	}
	e.s.mu.Lock()
	l.last = err
	l.pause = min(max(2*l.pause, retryFirst), retryMost)
	pause := l.pause
	if left := time.Until(l.refetch.until); step == Unpack && left > 0 {
		pause = left
	}
	e.s.signal(l)
	e.s.mu.Unlock()
	log.L.WithError(err).WithFields(log.Fields{"layer": id, "step": step.String(), "again": pause}).Error("work on a layer failed")
	e.later(id, pause)
}

func (e *executor) later(id LayerID, pause time.Duration) {
	time.AfterFunc(pause, func() {
		if e.ctx.Err() == nil {
			e.kick(id)
		}
	})
}

// close lets steps end that are under way.
func (e *executor) close() {
	e.stop()
	for _, l := range e.lanes {
		l.close()
	}
	e.wg.Wait()
}

// setIdleIO puts the calling thread into the idle class of the I/O schedulers
// that have one (ioprio_set(2)).
func setIdleIO() error {
	const whoProcess, classIdle, classShift = 1, 3, 13
	if _, _, e := unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, classIdle<<classShift); e != 0 {
		return e
	}
	return nil
}
