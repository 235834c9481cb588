// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// jobs runs background work, each piece at most once at a time, on a bounded
// number of workers. Work is named; asking for what is under way joins it.
//
// Who needs a result at once calls do, which runs a waiting piece in its own
// goroutine: so work may depend on other work without tying up the workers.
type jobs struct {
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	cond    *sync.Cond
	queue   []*job
	byName  map[string]*job
	running int
	closed  bool
}

type job struct {
	name string
	run  func(context.Context) error
	once sync.Once
	done chan struct{}
	err  error
}

func newJobs(workers int) *jobs {
	ctx, stop := context.WithCancel(context.Background())
	j := &jobs{ctx: ctx, stop: stop, byName: map[string]*job{}}
	j.cond = sync.NewCond(&j.mu)
	for range max(workers, 1) {
		j.wg.Go(j.work)
	}
	return j
}

func (j *jobs) work() {
	for {
		j.mu.Lock()
		for len(j.queue) == 0 && !j.closed {
			j.cond.Wait()
		}
		if j.closed {
			j.mu.Unlock()
			return
		}
		next := j.queue[0]
		j.queue = j.queue[1:]
		j.mu.Unlock()
		j.perform(next)
	}
}

// perform runs a job if nobody has yet, and returns when it has run.
func (j *jobs) perform(b *job) {
	b.once.Do(func() {
		j.mu.Lock()
		j.running++
		j.mu.Unlock()
		b.err = b.run(j.ctx)
		switch l := log.G(j.ctx).WithError(b.err).WithField("job", b.name); {
		case b.err == nil || j.ctx.Err() != nil:
		case errdefs.IsNotFound(b.err): // what it was for was collected meanwhile, or who waits is told
			l.Debug("background work has come too late")
		default:
			l.Error("background work failed")
		}
		j.mu.Lock()
		j.running--
		delete(j.byName, b.name)
		j.mu.Unlock()
		close(b.done)
	})
}

// add queues work unless work of that name is waiting or running.
func (j *jobs) add(name string, run func(context.Context) error) *job {
	j.mu.Lock()
	defer j.mu.Unlock()
	if known, ok := j.byName[name]; ok {
		return known
	}
	b := &job{name: name, run: run, done: make(chan struct{})}
	j.byName[name] = b
	j.queue = append(j.queue, b)
	j.cond.Signal()
	return b
}

// do queues work, or joins it, and waits for its end. The work goes on when
// ctx ends; only the waiting stops.
func (j *jobs) do(ctx context.Context, name string, run func(context.Context) error) error {
	b := j.add(name, run)
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return fmt.Errorf("%s: the daemon is stopping: %w", name, errdefs.ErrUnavailable)
	}
	j.wg.Go(func() { j.perform(b) })
	j.mu.Unlock()
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// length is the number of pieces waiting or running.
func (j *jobs) length() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.byName)
}

// close lets running work end and forgets what waits: it is derived from the
// database and comes back at the next start.
func (j *jobs) close() {
	j.stop()
	j.mu.Lock()
	j.closed = true
	j.cond.Broadcast()
	j.mu.Unlock()
	j.wg.Wait()
}
