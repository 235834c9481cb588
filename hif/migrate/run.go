// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
)

// loop is the engine's goroutine.
func (e *Engine) loop(ctx context.Context) {
	defer close(e.done)
	// The I/O class belongs to the thread: this one is the engine's until it ends.
	// Its priority for the processor is left alone: what waits for a lock of the Go
	// runtime that it holds would wait at that priority too.
	runtime.LockOSThread()
	if err := setIdleIO(); err != nil {
		log.G(ctx).WithError(err).Debug("migration keeps its normal I/O priority")
	}
	for {
		e.mu.Lock()
		g, changed, reached := e.goal, e.changed, e.goal.reached
		e.mu.Unlock()
		var again <-chan time.Time
		if !reached {
			if err := e.run(ctx, g); err != nil {
				if ctx.Err() != nil {
					return
				}
				continue // another goal
			}
		}
		if until, ok := e.rest(g); ok {
			again = time.After(time.Until(until))
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
			e.change(func() { g.reached = false })
		}
	}
}

// rest says what the engine does now that it has reached its goal, and when it
// looks again at what failed.
func (e *Engine) rest(g *goal) (until time.Time, again bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.goal != g || !g.reached {
		return time.Time{}, false
	}
	e.held = time.Time{} // who has nothing to do makes way for nobody
	for _, f := range e.failing {
		if !again || f.until.Before(until) {
			until, again = f.until, true
		}
	}
	switch {
	case e.paused:
		e.enter(Paused, "")
	case again:
		e.enter(Waiting, "to try again what failed")
	default:
		e.enter(Idle, "")
	}
	return until, again
}

// run works on a goal until it is reached or replaced.
func (e *Engine) run(ctx context.Context, g *goal) error {
	r := &run{Engine: e, goal: g, dirty: map[string]bool{}, start: time.Now()}
	err := r.work(ctx)
	// What was changed is told even where the engine is being closed.
	for id := range r.dirty {
		if e := r.settle(context.WithoutCancel(ctx), id); e != nil {
			r.result(id, e)
		}
	}
	e.mu.Lock()
	p, failing := e.progress, len(e.failing)
	e.mu.Unlock()
	if err == nil {
		e.change(func() {
			e.stats.Runs++
			e.progress.Current, e.progress.CurrentDirection = "", ""
			if e.goal == g {
				g.reached, e.now = true, false
			}
		})
	}
	if p.Down.Done.Files+p.Up.Done.Files > 0 || r.homes > 0 {
		l := log.G(ctx).WithFields(log.Fields{
			"took": time.Since(r.start).Round(time.Millisecond), "home": r.homes, "failing": failing,
			"left_nvm": p.Down.Done.Files, "left_nvm_bytes": p.Down.Done.Bytes, "to_nvm": p.Up.Done.Files, "to_nvm_bytes": p.Up.Done.Bytes,
		})
		if err == nil {
			l.Info("migration has reached its plan")
		} else {
			l.WithError(err).Info("migration was interrupted")
		}
	}
	return err
}

// run is one run of the engine.
type run struct {
	*Engine
	goal  *goal
	dirty map[string]bool // layers of which the accounting is out of date
	start time.Time
	homes int
}

func (r *run) work(ctx context.Context) error {
	if err := r.survey(ctx); err != nil {
		return err
	}
	for i := range r.goal.Down {
		d := &r.goal.Down[i]
		if !r.due(d.Layer) {
			continue
		}
		err := r.reduce(ctx, d)
		if stop(ctx, err) {
			return err
		}
		r.result(d.Layer, err)
	}
	return r.promote(ctx)
}

// stop tells whether an error ends the run; others concern one layer or file.
func stop(ctx context.Context, err error) bool {
	return err != nil && (errors.Is(err, errReplaced) || ctx.Err() != nil)
}

// survey counts what is to do.
func (r *run) survey(ctx context.Context) error {
	var down, up plan.Sum
	homeless := 0
	settled := map[string]bool{}
	defer func() { r.settled = settled }()
	for i := range r.goal.Down {
		d := &r.goal.Down[i]
		settled[d.Layer] = r.settled[d.Layer]
		if !d.AtHome {
			homeless++
		}
		leave, err := r.leaving(d)
		if err != nil {
			continue // work will meet it too
		}
		for _, f := range leave {
			down.Add(f.Bytes)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	for _, u := range r.goal.Up {
		if stands, err := r.host.Stands(u.Redirect); err == nil && !stands {
			up.Add(u.Size)
		}
	}
	r.change(func() { r.progress.Down, r.progress.Up = Direction{Left: down}, Direction{Left: up} })
	if homeless+down.Files+up.Files > 0 {
		log.G(ctx).WithFields(log.Fields{
			"home": homeless, "leave_nvm": down.Files, "leave_nvm_bytes": down.Bytes, "to_nvm": up.Files, "to_nvm_bytes": up.Bytes,
			"pressure": r.goal.Pressure,
		}).Info("migration begins")
	}
	return nil
}

// leaving are the files of a layer that do not belong on NVM.
func (r *run) leaving(d *plan.Reduction) (leave []File, err error) {
	for f, err := range r.host.OnNVM(d.Layer) {
		if err != nil {
			return nil, fmt.Errorf("list layer %s on NVM: %w", d.Layer, err)
		}
		if !d.Keep[f.Redirect] {
			leave = append(leave, f)
		}
	}
	return leave, nil
}

// reduce leaves of a layer on NVM what is to stay.
func (r *run) reduce(ctx context.Context, d *plan.Reduction) error {
	log.G(ctx).WithFields(log.Fields{"id": d.Layer, "keep": len(d.Keep), "frees": d.Freed}).Debugf("migration: %s", d.Reason)
	if !d.AtHome {
		r.current(d.Layer, "home")
		if err := r.gate(ctx, r.goal, 1, 0, nil); err != nil {
			return err
		}
		r.config.step("home")
		r.homing = true
		err := r.host.BringHome(ctx, d.Layer, func(n int) error {
			return r.gate(ctx, r.goal, 0, n, func(next *goal) bool { return next.wants(d.Layer) })
		})
		r.homing = false
		if err != nil {
			if errdefs.IsNotFound(err) {
				return r.gone(d.Layer)
			}
			return fmt.Errorf("bring layer %s home: %w", d.Layer, err)
		}
		r.homes++
		r.change(func() { r.stats.Home++ })
	}
	leave, err := r.leaving(d)
	if err != nil {
		return err
	}
	if len(leave) == 0 && d.AtHome && r.settled[d.Layer] {
		return nil // a plan names every layer that has hot files, at least once a minute
	}
	r.dirty[d.Layer] = true
	delete(r.settled, d.Layer)
	var failed error
	for _, f := range leave {
		r.current(f.Redirect, "down")
		if err := r.gate(ctx, r.goal, 1, 0, nil); err != nil {
			return err
		}
		r.config.step("demote")
		freed, held, err := r.host.Demote(f.Redirect)
		if err != nil {
			if failed == nil {
				failed = err
			}
			continue
		}
		r.change(func() {
			r.progress.Down.move(f.Bytes)
			r.stats.Down.Files++
			r.stats.Down.Bytes += freed + held
			r.stats.Freed += freed
		})
	}
	if failed != nil {
		return failed
	}
	r.config.step("settle")
	if err := r.settle(ctx, d.Layer); err != nil {
		return err
	}
	r.settled[d.Layer] = true
	return nil
}

func (d *Direction) move(bytes int64) {
	d.Done.Files++
	d.Done.Bytes += bytes
	d.Left.Files = max(0, d.Left.Files-1)
	d.Left.Bytes = max(0, d.Left.Bytes-bytes)
}

// promote brings up what belongs on NVM.
func (r *run) promote(ctx context.Context) error {
	var waiting plan.Sum
	var full error
	for _, u := range r.goal.Up {
		if !r.due(u.Redirect) {
			continue
		}
		if stands, err := r.host.Stands(u.Redirect); err != nil || stands {
			r.result(u.Redirect, err)
			continue
		}
		if full != nil {
			waiting.Add(u.Size)
			continue
		}
		r.current(u.Redirect, "up")
		if err := r.gate(ctx, r.goal, 1, 0, nil); err != nil {
			return err
		}
		// Space that the plan has freed may not be free yet, or may be somebody else's by now.
		free, err := r.host.Free()
		if err != nil {
			r.result(noRoom, err)
			return nil
		}
		if free-u.Size < r.goal.Floor {
			waiting.Add(u.Size)
			continue
		}
		r.config.step("promote")
		id := layerOf(u.Redirect)
		r.dirty[id] = true
		copied, err := r.host.Promote(ctx, u.Redirect, func(n int) error {
			return r.gate(ctx, r.goal, 0, n, func(next *goal) bool { return next.up[u.Redirect] })
		})
		switch {
		case stop(ctx, err):
			return err
		case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
			full = err
			waiting.Add(u.Size)
			continue
		}
		r.result(u.Redirect, err)
		if err == nil {
			r.change(func() {
				r.progress.Up.move(u.Size)
				r.stats.Up.Files++
				r.stats.Up.Bytes += copied
			})
		}
	}
	if waiting.Files == 0 {
		r.result(noRoom, nil)
		return nil
	}
	err := fmt.Errorf("no room on NVM for %d files of %d bytes, with %d bytes held by files that are open or cached: %w",
		waiting.Files, waiting.Bytes, r.host.Held(), errdefs.ErrResourceExhausted)
	if full != nil {
		err = fmt.Errorf("%w: %w", err, full)
	}
	r.result(noRoom, err)
	return nil
}

// settle tells the host what a layer occupies.
func (r *run) settle(ctx context.Context, id string) error {
	var bytes int64
	var err error
	for f, e := range r.host.OnNVM(id) {
		bytes, err = bytes+f.Bytes, e
	}
	if err == nil {
		err = r.host.Settled(ctx, id, bytes)
	}
	if errdefs.IsNotFound(err) {
		err = r.gone(id)
	}
	if err != nil {
		return fmt.Errorf("account for layer %s: %w", id, err)
	}
	delete(r.dirty, id)
	return nil
}

// gone removes what the engine may have made of a layer after its removal.
func (r *run) gone(id string) error {
	delete(r.dirty, id)
	delete(r.settled, id)
	r.change(func() {
		for name := range r.failing {
			if name == id || layerOf(name) == id {
				delete(r.failing, name)
			}
		}
	})
	return r.host.Gone(id)
}

func layerOf(redirect string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(redirect, "/"), "/")
	return id
}

func (r *run) current(name, direction string) {
	r.change(func() { r.progress.Current, r.progress.CurrentDirection = name, direction })
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
