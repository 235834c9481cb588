// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package migrate brings the tiers to what a plan says, slowly.
//
// Each step leaves a whole file under its name on at least one tier, and what is
// left to do is found by looking at what stands where. So the engine keeps no
// journal: after it died at any point the same plan, applied again, goes on
// where it ended.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/hif/plan"
)

// File is a whole file that stands on NVM.
type File struct {
	Redirect string // as of pack.Ref
	Bytes    int64  // that it occupies there
}

// Host is the store as the engine sees it: layers by their ids, decimal, and their data files by their redirects. Its methods
// are called from several goroutines; those that move files from one, the engine's.
type Host interface {
	// Busy tells why moving has to wait: a pull or a start is under way. It is
	// asked before each step, so it must be quick.
	Busy() (reason string, busy bool)
	// BringHome fills the holes of a layer's pack and returns when it is whole, durably, and its
	// record says so. ErrNotFound if the layer is gone. It calls pace, in the same
	// goroutine, before it copies a piece of so many bytes; an error of pace ends
	// it, and the next call goes on where it ended.
	BringHome(ctx context.Context, layer string, pace func(int) error) error
	// OnNVM goes through the files of a layer that stand on NVM, none if the layer is gone. It ends after the first error.
	OnNVM(layer string) iter.Seq2[File, error]
	// Stands tells whether a file stands on NVM.
	Stands(redirect string) (bool, error)
	// Promote copies a file from its pack to NVM, where it stands under its name only when it is whole and synced. It may be
	// open, mapped or executed meanwhile. It calls pace like BringHome, and returns the bytes it copied, 0 for a file that
	// stands there. ErrNotFound if there is no such file or layer; an error of unix.ENOSPC or EDQUOT if there is no room.
	Promote(ctx context.Context, redirect string, pace func(int) error) (copied int64, err error)
	// Demote removes a file from NVM and tells which of its bytes are free and which somebody still holds. A file that
	// does not stand there is no work. ErrFailedPrecondition if the layer's pack is not whole, durably.
	Demote(redirect string) (freed, held int64, err error)
	// Held is how many bytes of demoted files somebody still has open or cached.
	Held() int64
	// Free is how much of NVM is free, in bytes.
	Free() (int64, error)
	// Settled tells how many bytes the files of a layer occupy on NVM after some were moved.
	// ErrNotFound if the layer is gone; the engine then has Gone remove what stands of it.
	Settled(ctx context.Context, layer string, nvmBytes int64) error
	// Gone removes the files that the engine brought to NVM of a layer after its removal.
	Gone(layer string) error
}

// Config is how fast the engine goes. Zero means no limit.
type Config struct {
	Rate       int64 // bytes copied a second
	Operations int   // files moved a second
	// Disk is the share of time, 0 to 1, in which others may keep the HDD busy
	// without stopping the engine; 0 is [DefaultDisk], 1 never stops it.
	Disk float64
	// HDD is any path on the HDD tier, to find its device.
	HDD string

	step     func(string)  // tests: before each step
	retry    time.Duration // tests: first pause after a failure
	patience time.Duration // tests
}

// DefaultDisk is the share of time that others may use the HDD in peace.
const DefaultDisk = 0.3

// State is what the engine does.
type State int

const (
	Idle    State = iota // the tiers look like the plan
	Running              // it moves files
	Waiting              // it will go on by itself; Reason says what it waits for
	Paused               // it goes on when told
)

// String returns "idle", "running", "waiting" or "paused".
func (s State) String() string {
	switch s {
	case Running:
		return "running"
	case Waiting:
		return "waiting"
	case Paused:
		return "paused"
	default:
		return "idle"
	}
}

// Direction is the work in one direction of the present run.
type Direction struct {
	Done, Left plan.Sum
}

// Progress is where the engine stands.
type Progress struct {
	State   State
	Reason  string    // what it waits for
	Since   time.Time // of State and Reason
	Now     bool      // without limits
	Down    Direction // files that leave NVM
	Up      Direction // files that come up
	Pinned  int64     // bytes that left but are still held by somebody
	Current string    // redirect of the file, or id of the layer that is brought home
	// CurrentDirection is "home", "down" or "up", and "" if Current is.
	CurrentDirection string
	Error            string    // of the last failure that is not yet made good; "" if none
	ErrorAt          time.Time // of Error
	Failing          int       // layers and files that failed and will be tried again
}

// Stats are counters since the engine was made.
type Stats struct {
	Down, Up plan.Sum
	Home     int64 // layers brought home
	Freed    int64 // bytes that came free on NVM, but for those still pinned when counted
	Failures int64
	Runs     int64 // that reached their goal
	Waited   map[string]time.Duration
}

// Engine moves files. Its methods may be called from several goroutines.
type Engine struct {
	host   Host
	config Config
	bytes  *rate.Limiter
	ops    *rate.Limiter
	disk   *disk
	cancel context.CancelFunc
	done   chan struct{}

	// homing: a layer is being brought home. Of the engine's goroutine alone.
	homing bool
	// held is since when the engine makes way for others without a break; zero: it
	// does not. Of the engine's goroutine alone.
	held time.Time
	// settled are layers that were accounted for since something of them last left
	// NVM. Of the engine's goroutine alone.
	settled map[string]bool

	mu       sync.Mutex
	goal     *goal
	changed  chan struct{} // closed whenever something below or goal changes
	paused   bool
	now      bool
	progress Progress
	stats    Stats
	failing  map[string]*failure // by layer id or redirect
}

// goal is a plan, prepared.
type goal struct {
	plan.Plan
	up      map[string]bool
	reached bool
}

// New starts an engine without a goal. Close it after use.
func New(config Config, host Host) (*Engine, error) {
	if config.Rate < 0 || config.Operations < 0 || config.Disk < 0 || config.Disk > 1 {
		return nil, fmt.Errorf("migration limits %d bytes/s, %d operations/s, disk share %g: must not be negative, nor the share above 1: %w",
			config.Rate, config.Operations, config.Disk, errdefs.ErrInvalidArgument)
	}
	if config.Disk == 0 {
		config.Disk = DefaultDisk
	}
	if config.retry == 0 {
		config.retry = firstRetry
	}
	if config.patience == 0 {
		config.patience = patience
	}
	if config.step == nil {
		config.step = func(string) {}
	}
	e := &Engine{
		host: host, config: config,
		bytes: rate.NewLimiter(rate.Inf, 0), ops: rate.NewLimiter(rate.Inf, 0),
		disk: newDisk(config.HDD, config.Disk),
		done: make(chan struct{}), changed: make(chan struct{}), failing: map[string]*failure{}, settled: map[string]bool{},
		goal:     &goal{reached: true},
		progress: Progress{Since: time.Now()},
		stats:    Stats{Waited: map[string]time.Duration{}},
	}
	if config.Rate > 0 {
		e.bytes = rate.NewLimiter(rate.Limit(config.Rate), burst)
	}
	if config.Operations > 0 {
		e.ops = rate.NewLimiter(rate.Limit(config.Operations), max(1, config.Operations/10))
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	go e.loop(ctx)
	return e, nil
}

// burst is more than any piece that a [Host] copies at once.
const burst = 1 << 20

// Apply makes a plan the goal, in place of the one before, and returns. A file
// that is being copied is finished if the new plan wants it too.
func (e *Engine) Apply(p plan.Plan) {
	g := &goal{Plan: p, up: make(map[string]bool, len(p.Up))}
	for _, u := range p.Up {
		g.up[u.Redirect] = true
	}
	e.change(func() {
		e.goal = g
		// What failed keeps its growing pause, also under a new plan.
		for name := range e.failing {
			if !g.wants(name) {
				delete(e.failing, name)
			}
		}
	})
}

func (g *goal) wants(name string) bool {
	if g.up[name] {
		return true
	}
	for i := range g.Down {
		if g.Down[i].Layer == name {
			return true
		}
	}
	return false
}

// Pause stops after the present piece; also a run without limits.
func (e *Engine) Pause() { e.change(func() { e.paused, e.now = true, false }) }

// Resume takes Pause back.
func (e *Engine) Resume() { e.change(func() { e.paused = false }) }

// Now makes the engine reach its goal without limits, without waiting for
// anybody, and try at once again what failed. It resumes a paused engine and
// ends with the run.
func (e *Engine) Now() {
	e.change(func() {
		e.paused = false
		for _, f := range e.failing {
			f.until = time.Time{}
			e.goal.reached = false
		}
		e.now = !e.goal.reached // else the next plan would be hurried, which nobody asked for
	})
}

// Wait returns when the goal is reached, with nil, or when only what failed is
// left for later, with its error. It waits while the engine is paused.
func (e *Engine) Wait(ctx context.Context) error {
	for {
		e.mu.Lock()
		reached, changed := e.goal.reached, e.changed
		var err error
		for _, f := range e.failing {
			err = errors.Join(err, f.err)
		}
		e.mu.Unlock()
		if reached {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-e.done:
			return fmt.Errorf("migration was closed: %w", errdefs.ErrUnavailable)
		case <-changed:
		}
	}
}

// Progress tells where the engine stands.
func (e *Engine) Progress() Progress {
	pinned := e.host.Held()
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.progress
	p.Pinned, p.Now, p.Failing = pinned, e.now, len(e.failing)
	for _, f := range e.failing {
		if !f.at.Before(p.ErrorAt) {
			p.ErrorAt, p.Error = f.at, f.err.Error()
		}
	}
	return p
}

// Stats returns the counters.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.stats
	s.Waited = make(map[string]time.Duration, len(e.stats.Waited))
	for k, v := range e.stats.Waited {
		s.Waited[k] = v
	}
	return s
}

// Close stops the engine after the present step and waits for it.
func (e *Engine) Close() error {
	e.cancel()
	<-e.done
	return nil
}

// Reached tells whether the tiers look like the plan that was applied last, but
// for what failed and will be tried again. A plan just applied is not reached
// before the engine has looked at it.
func (e *Engine) Reached() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.goal.reached
}

// change changes what mu guards, and tells whoever waits.
func (e *Engine) change(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
	close(e.changed)
	e.changed = make(chan struct{})
}
