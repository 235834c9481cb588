// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// changes tells that files or directories have changed, by inotify, and now and
// then without cause. Where inotify is not available it polls.
type changes struct {
	ctx    context.Context
	events *os.File // nil without inotify
	signal chan struct{}
	poll   time.Duration
	seen   map[string]struct{} // see addOnce
	wg     sync.WaitGroup
}

// mostInstances bounds the inotify instances of this process: the limit of a user, 128 by default, is also containerd's and
// everybody's who runs as root. An image may have more layers, all of which wait at once.
const mostInstances = 24

var instances atomic.Int64

func watch(ctx context.Context) *changes {
	c := &changes{ctx: ctx, signal: make(chan struct{}, 1), poll: pollAlone, seen: map[string]struct{}{}}
	if instances.Add(1) > mostInstances {
		instances.Add(-1)
		c.poll = pollBeyond
		return c
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		instances.Add(-1)
		return c
	}
	c.events, c.poll = os.NewFile(uintptr(fd), "inotify"), pollWithEvents
	c.wg.Go(func() {
		buf := make([]byte, 16<<10)
		for {
			// Close ends it. What happened does not matter, only that something did.
			if _, err := c.events.Read(buf); err != nil {
				return
			}
			select {
			case c.signal <- struct{}{}:
			default:
			}
		}
	})
	return c
}

// add watches a file or directory.
func (c *changes) add(path string) {
	if c.events == nil {
		return
	}
	raw, err := c.events.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			_, err = unix.InotifyAddWatch(int(fd), path, unix.IN_MODIFY|unix.IN_ATTRIB|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|
				unix.IN_DELETE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
		})
		if err == nil {
			err = cerr
		}
	}
	if err != nil {
		c.poll = pollAlone // the limit of watches, or the file is gone
	}
}

// addOnce watches a directory if it is not watched yet.
func (c *changes) addOnce(path string) {
	if _, ok := c.seen[path]; ok {
		return
	}
	c.seen[path] = struct{}{}
	c.add(path)
}

// clear forgets the changes so far.
func (c *changes) clear() {
	select {
	case <-c.signal:
	default:
	}
}

// wait blocks until something may have changed since clear. The error is that
// of the context.
func (c *changes) wait() error {
	t := time.NewTimer(c.poll)
	defer t.Stop()
	select {
	case <-c.signal:
	case <-t.C:
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	return nil
}

func (c *changes) close() {
	if c.events != nil {
		c.events.Close()
		c.wg.Wait()
		c.events = nil
		instances.Add(-1)
	}
}
