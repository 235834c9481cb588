// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
)

// Kinds of requests, for Fault.Ops.
const (
	Reads   = "r"
	Writes  = "w"
	Flushes = "f"
)

// Fault is what goes wrong with the requests of a disk. The zero value is a disk that works.
type Fault struct {
	// Ops are the kinds of requests that it concerns: Reads, Writes, Flushes, or several of them joined.
	Ops string `json:"ops"`
	// Least is the size in bytes from which reads and writes are concerned. Data of files is written in large requests,
	// the metadata of ext4 in small ones.
	Least int64 `json:"least"`
	// Skip is how many of these requests pass first, and Times how many are struck then; 0: all that follow.
	Skip  int64 `json:"skip"`
	Times int64 `json:"times"`
	// Hold lets requests wait until another fault is set, or the power is cut, instead of failing with EIO.
	Hold bool `json:"hold"`
}

func (f Fault) check() error {
	if strings.Trim(f.Ops, Reads+Writes+Flushes) != "" {
		return errors.New("ops are some of r, w and f")
	}
	if f.Least < 0 || f.Skip < 0 || f.Times < 0 {
		return errors.New("negative number")
	}
	return nil
}

// breaker decides for each request whether the fault strikes it.
type breaker struct {
	mu      sync.Mutex
	fault   Fault
	seen    int64         // requests that the fault concerns, since it was set
	struck  int64         // since the disk started
	changed chan struct{} // closed and replaced when another fault is set
}

func newBreaker() *breaker { return &breaker{changed: make(chan struct{})} }

func (b *breaker) set(f Fault) error {
	if err := f.check(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault, b.seen = f, 0
	close(b.changed)
	b.changed = make(chan struct{})
	return nil
}

func (b *breaker) get() (f Fault, struck int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fault, b.struck
}

// pass returns 0 for a request that may go on. A request that is held asks again when another fault is set.
func (b *breaker) pass(ctx context.Context, op string, n int64) syscall.Errno {
	for {
		b.mu.Lock()
		if !b.strikes(op, n) {
			b.mu.Unlock()
			return 0
		}
		b.struck++
		hold, changed := b.fault.Hold, b.changed
		b.mu.Unlock()
		if !hold {
			return syscall.EIO
		}
		select {
		case <-changed:
		case <-ctx.Done(): // who asked was killed
			return syscall.EINTR
		}
	}
}

// strikes counts a request. Called with mu held.
func (b *breaker) strikes(op string, n int64) bool {
	f := b.fault
	if !strings.Contains(f.Ops, op) || (op != Flushes && n < f.Least) {
		return false
	}
	b.seen++
	return b.seen > f.Skip && (f.Times == 0 || b.seen <= f.Skip+f.Times)
}
