// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errReplaced ends a run whose goal is no longer the goal, or that is to begin anew.
var errReplaced = errors.New("another plan was applied")

// look is how long the engine waits before it looks again whether it may go on.
const look = 200 * time.Millisecond

// patience is how long the engine makes way for others without a break where NVM
// is short. On a host where one start or pull follows on the other all day, or
// the HDD is never quiet, nothing would leave NVM else, and pulls would fail.
const patience = time.Minute

// overdue tells, each time that the engine would make way, whether it has done
// that for long enough.
func (e *Engine) overdue(pressure bool) bool {
	if e.held.IsZero() {
		e.held = time.Now()
	}
	return pressure && time.Since(e.held) > e.config.patience
}

// gate lets a piece of work through: n bytes or operations, when neither a pause
// nor others nor the limits are in the way. still tells whether a piece of an
// old goal belongs to the next one too.
func (e *Engine) gate(ctx context.Context, g *goal, operations, bytes int, still func(next *goal) bool) error {
	took := false
	for {
		e.mu.Lock()
		goal, changed, paused, now := e.goal, e.changed, e.paused, e.now
		e.mu.Unlock()
		if err := ctx.Err(); err != nil {
			return err
		}
		if goal != g && (still == nil || !still(goal)) {
			return errReplaced
		}
		var pause time.Duration
		state, reason, kind := Running, "", ""
		switch {
		case paused && e.homing:
			return errReplaced // the host copies one layer at a time: others may go on
		case paused:
			state, kind = Paused, "pause"
		case now:
		default:
			why, busy := e.host.Busy()
			if busy && !e.overdue(goal.Pressure) {
				state, reason, kind, pause = Waiting, why, "busy", look
				e.disk.begun = sample{} // what the disk does meanwhile is of what we wait for
				break
			}
			// What is brought home is written out by the kernel when it likes, so the
			// disk would be found busy with that; the idle I/O class has to do.
			if !busy && !e.homing {
				pause = e.disk.listen()
				if e.disk.busy && e.overdue(goal.Pressure) {
					pause = 0
				}
			}
			if !busy && !e.disk.busy && pause == 0 {
				e.held = time.Time{}
			}
			if pause > 0 {
				if kind = "disk"; e.disk.busy {
					state, reason = Waiting, fmt.Sprintf("others keep the HDD busy (%.0f %% of the time)", 100*e.disk.share)
				}
				break
			}
			if !took {
				took = true
				pause = max(e.ops.ReserveN(time.Now(), operations).Delay(), e.bytes.ReserveN(time.Now(), bytes).Delay())
				kind = "limit"
			}
		}
		e.mu.Lock()
		e.enter(state, reason)
		e.mu.Unlock()
		if pause == 0 && state == Running {
			return nil
		}
		begun := time.Now()
		e.sleep(ctx, pause, changed)
		e.mu.Lock()
		e.stats.Waited[kind] += time.Since(begun)
		e.mu.Unlock()
	}
}

// sleep waits for a time, 0 for ever, or until something changes.
func (e *Engine) sleep(ctx context.Context, pause time.Duration, changed <-chan struct{}) {
	var over <-chan time.Time
	if pause > 0 {
		t := time.NewTimer(pause)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-ctx.Done():
	case <-changed:
	case <-over:
	}
}

// enter changes the state; mu is held.
func (e *Engine) enter(state State, reason string) {
	if e.progress.State != state || (reason == "") != (e.progress.Reason == "") {
		e.progress.Since = time.Now()
	}
	e.progress.State, e.progress.Reason = state, reason
}
