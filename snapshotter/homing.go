// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/placement"
)

// homing copies layers that stand on NVM only to HDD, the home of all data,
// so that the loss of NVM loses no image. It yields to pulls, and for a while to
// starts.
type homing struct {
	s      *Snapshotter
	wake   chan struct{}
	cancel context.CancelFunc
	done   chan struct{}

	copying chan struct{} // one layer at a time; a channel, since who waits may have to stop

	mu      sync.Mutex
	left    int
	current string
	failed  int64
	lastErr string
}

// homingRetry is when copying that failed is tried again.
const homingRetry = time.Minute

const (
	// yield is how long homing waits before it looks again whether a pull or start is over.
	yield = time.Second
	// yieldToStarts bounds that for starts, at each piece: where one follows on the
	// other all day, images must come home all the same.
	yieldToStarts = 5 * time.Second
)

func newHoming(s *Snapshotter) *homing {
	return &homing{s: s, wake: make(chan struct{}, 1), done: make(chan struct{}), copying: make(chan struct{}, 1)}
}

func (h *homing) start() {
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	go h.run(ctx)
}

// kick tells that there may be something to copy.
func (h *homing) kick() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *homing) close() {
	h.cancel()
	<-h.done
}

func (h *homing) run(ctx context.Context) {
	defer close(h.done)
	// The I/O class belongs to the thread: this one is homing's until it ends.
	runtime.LockOSThread()
	if err := setIdleIO(); err != nil {
		log.G(ctx).WithError(err).Debug("copying to HDD keeps its normal I/O priority")
	}
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		case <-again:
		}
		again = nil
		if !h.s.config.WriteBack {
			continue
		}
		if err := h.copyAll(ctx); err != nil && ctx.Err() == nil {
			h.mu.Lock()
			h.failed++
			h.lastErr = err.Error()
			h.mu.Unlock()
			log.G(ctx).WithError(err).Error("not all layers could be copied to HDD; trying again later")
			again = time.After(homingRetry)
		}
	}
}

func (h *homing) copyAll(ctx context.Context) error {
	all, err := h.s.db.snapshots(ctx)
	if err != nil {
		return err
	}
	var todo []snapshot
	for _, sn := range all {
		if sn.Info.Kind == snapshots.KindCommitted && sn.Tier == placement.NVM && sn.Durable && !sn.Home && sn.Damaged == "" {
			todo = append(todo, sn)
		}
	}
	defer func() {
		h.mu.Lock()
		h.left, h.current = 0, ""
		h.mu.Unlock()
	}()
	var failed error
	for i, sn := range todo {
		h.mu.Lock()
		h.left, h.current = len(todo)-i, sn.ID
		h.mu.Unlock()
		if err := h.copyLayer(ctx, sn, h.pace(ctx)); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			failed = errors.Join(failed, err) // one bad layer must not keep the others from their copy
		}
	}
	return failed
}

// bring makes HDD the home of a layer: all its data are there, durably, and
// what stands on NVM is a copy from then on. It returns an error that is
// ErrUnavailable for a layer that is not durable yet.
//
// pace is as for [tier.Store.WriteBack].
func (h *homing) bring(ctx context.Context, id string, pace func(int) error) error {
	r, err := h.s.db.record(ctx, id)
	switch {
	case err != nil:
		return err
	case r.Tier == placement.HDD:
		return nil
	case !r.Durable || r.Damaged != "":
		return fmt.Errorf("layer id %s is not on its device yet: %w", id, errdefs.ErrUnavailable)
	}
	if err := h.copyLayer(ctx, snapshot{ID: id, record: r}, pace); err != nil {
		return err
	}
	// A database restored from its copy must not take NVM for the place of files
	// that have left it: it would capture or copy home what is left of the layer.
	if err := h.s.mirror.flush(ctx); err != nil {
		return err
	}
	err = h.s.db.updateRecord(ctx, id, func(r *record) {
		if r.Home {
			r.Tier, r.Mixed, r.NVMBytes = placement.HDD, true, r.Data
		}
	})
	if err != nil {
		return err
	}
	h.s.mirror.changed()
	if r, err = h.s.db.record(ctx, id); err == nil && r.Tier != placement.HDD {
		err = fmt.Errorf("layer id %s could not be copied to HDD: %w", id, errdefs.ErrUnavailable)
	}
	return err
}

// copyLayer copies a layer to HDD, unless that is done.
func (h *homing) copyLayer(ctx context.Context, sn snapshot, pace func(int) error) error {
	select {
	case h.copying <- struct{}{}:
		defer func() { <-h.copying }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if r, err := h.s.db.record(ctx, sn.ID); err != nil || r.Home || r.Damaged != "" || r.Tier != placement.NVM {
		if errdefs.IsNotFound(err) {
			return nil // removed meanwhile
		}
		return err
	} else {
		sn.record = r
	}
	start := time.Now()
	if sn.Homing != h.s.config.BootID {
		// Begun before the machine last went down, maybe: what is there may be torn.
		if err := h.s.tiers.DropCopy(sn.ID); err != nil {
			return err
		}
		if err := h.s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Homing = h.s.config.BootID }); err != nil {
			return err
		}
	}
	failures := h.s.tiers.Failures(placement.HDD)
	n, err := h.s.tiers.WriteBack(ctx, sn.ID, pace)
	if err == nil {
		err = h.s.syncer.flush(ctx, placement.HDD)
		if err == nil && h.s.tiers.Failures(placement.HDD) != failures {
			err = fmt.Errorf("the disk reported an error while layer id %s was copied: %w", sn.ID, errdefs.ErrDataLoss)
		}
		if err != nil { // a second sync would prove nothing
			err = errors.Join(err, h.s.tiers.DropCopy(sn.ID))
		}
	}
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("HDD root %q is full; free space there: %w", h.s.tiers.Root(placement.HDD), err)
	}
	if err != nil {
		if _, e := h.s.db.record(ctx, sn.ID); errdefs.IsNotFound(e) {
			// Removed meanwhile; what was copied after that goes too.
			return h.s.tiers.Remove(sn.ID)
		}
		return err
	}
	if err := h.s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Home, r.Homing = true, "" }); err != nil {
		return err
	}
	h.s.mirror.changed()
	log.G(ctx).WithFields(log.Fields{"id": sn.ID, "bytes": n, "took": time.Since(start)}).Info("layer copied to HDD")
	return nil
}

// pace lets a piece be copied when no pull is going on and the rate allows it.
func (h *homing) pace(ctx context.Context) func(int) error {
	limit := rate.NewLimiter(rate.Inf, 0)
	if r := h.s.config.WriteBackRate; r > 0 {
		limit = rate.NewLimiter(rate.Limit(r), 1<<20)
	}
	return func(n int) error {
		for since := time.Now(); h.s.placer.busy() || (h.s.starting() && time.Since(since) < yieldToStarts); {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(yield):
			}
		}
		return limit.WaitN(ctx, n)
	}
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
