// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/placement"
)

// syncer brings layers to their devices and marks them durable.
//
// While a pull goes on, layers on HDD are written out a few MiB at a time: the
// kernel would leave them in the page cache for up to 30 s
// (vm.dirty_expire_centisecs), and the end of the pull would wait for them; but
// containerd's own fsyncs on the same disk must not. When the pull is over, one
// sync of each filesystem serves all layers that wait for it.
type syncer struct {
	s      *Snapshotter
	wake   chan struct{}
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	pending map[string]*unsynced
}

type unsynced struct {
	id    string
	name  string
	tier  placement.Tier
	left  int64 // bytes that may still be in the page cache
	out   bool  // written out
	since time.Time
}

const (
	// syncLatest is how long a captured layer waits for its sync while pulls go on.
	syncLatest = 15 * time.Second
	// syncLook is how often the syncer looks by itself while there is something to do.
	syncLook = time.Second
)

func newSyncer(s *Snapshotter) *syncer {
	return &syncer{s: s, wake: make(chan struct{}, 1), done: make(chan struct{}), pending: map[string]*unsynced{}}
}

func (y *syncer) start() {
	ctx, cancel := context.WithCancel(context.Background())
	y.cancel = cancel
	go y.run(ctx)
}

// add queues a captured layer.
func (y *syncer) add(id, name string, t placement.Tier, bytes int64) {
	y.mu.Lock()
	y.pending[id] = &unsynced{id: id, name: name, tier: t, left: bytes, since: time.Now()}
	y.mu.Unlock()
	y.kick()
}

// kick tells that there may be something to do, or that a pull is over.
func (y *syncer) kick() {
	select {
	case y.wake <- struct{}{}:
	default:
	}
}

// backlog is the bytes of layers that are on the HDD tier but maybe not on the disk.
func (y *syncer) backlog() (bytes int64) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, u := range y.pending {
		if u.tier == placement.HDD {
			bytes += u.left
		}
	}
	return bytes
}

// waiting is the number of layers that are not durable yet.
func (y *syncer) waiting() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	return len(y.pending)
}

func (y *syncer) run(ctx context.Context) {
	defer close(y.done)
	for {
		var again <-chan time.Time // none wakes an idle daemon
		if y.waiting() > 0 || y.s.placer.busy() {
			again = time.After(syncLook)
		}
		select {
		case <-ctx.Done():
			return
		case <-y.wake:
		case <-again:
		}
		for ctx.Err() == nil {
			u := y.next()
			if u == nil {
				break
			}
			y.writeOut(ctx, u)
		}
		y.writeOutStaged(ctx)
		if y.due() {
			y.sync(ctx)
		}
	}
}

// next is a layer to be written out, nil if there is none or no pull to spare.
func (y *syncer) next() *unsynced {
	if !y.s.placer.busy() {
		return nil
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	var first *unsynced
	for _, u := range y.pending {
		if u.tier == placement.HDD && !u.out && (first == nil || u.since.Before(first.since)) {
			first = u
		}
	}
	return first
}

func (y *syncer) writeOut(ctx context.Context, u *unsynced) {
	start, written := time.Now(), int64(0)
	errOver := errors.New("the pull is over")
	err := y.s.tiers.WriteOut(ctx, u.tier, u.id, func(n int64) error {
		written += n
		y.mu.Lock()
		u.left = max(0, u.left-n)
		y.mu.Unlock()
		if !y.s.placer.busy() {
			return errOver // syncfs does the rest at full speed
		}
		return nil
	})
	y.mu.Lock()
	u.out = true
	y.mu.Unlock()
	if err != nil && !errors.Is(err, errOver) && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("cannot write a layer out early")
		return
	}
	y.s.rates.sawHDD(written, time.Since(start))
}

// writeOutStaged writes out what stands in the staging directories of parallel
// unpacks, whose layers are stored early and committed at the very end.
func (y *syncer) writeOutStaged(ctx context.Context) {
	for _, id := range y.s.placer.storingOnHDD() {
		err := y.s.tiers.WriteOut(ctx, placement.HDD, id, func(int64) error { return ctx.Err() })
		if err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Debug("cannot write a layer out while it is stored")
		}
	}
}

// due tells whether layers wait for their sync and no pull would suffer from it.
func (y *syncer) due() bool {
	busy := y.s.placer.busy()
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, u := range y.pending {
		if !busy || time.Since(u.since) > syncLatest {
			return true
		}
	}
	return false
}

func (y *syncer) sync(ctx context.Context) {
	y.mu.Lock()
	batch := make([]*unsynced, 0, len(y.pending))
	onNVM := false
	for _, u := range y.pending {
		batch = append(batch, u)
		onNVM = onNVM || u.tier == placement.NVM
	}
	y.mu.Unlock()
	if onNVM && y.flush(ctx, placement.NVM) != nil {
		return
	}
	// Captures stand on HDD whatever the tier of the data.
	if y.flush(ctx, placement.HDD) != nil {
		return
	}
	for _, u := range batch {
		if err := y.s.db.updateRecord(ctx, u.id, func(r *record) { r.Durable = r.Damaged == "" }); err != nil {
			log.G(ctx).WithError(err).Error("cannot record that a layer is durable; trying again")
			return
		}
		y.mu.Lock()
		if y.pending[u.id] == u {
			delete(y.pending, u.id)
		}
		y.mu.Unlock()
	}
	log.G(ctx).WithField("layers", len(batch)).Debug("durable")
	y.s.rates.save(ctx)
	y.s.mirror.changed()
	y.s.homing.kick()
	y.s.kickHot()
}

// flush syncs a tier. An error means that something was lost that was written
// there and not durable yet; the kernel takes the pages that it could not write
// for clean, so that a second sync would succeed and prove nothing.
func (y *syncer) flush(ctx context.Context, t placement.Tier) error {
	err := y.s.tiers.Sync(t)
	if err != nil && !errdefs.IsUnavailable(err) {
		log.G(ctx).WithError(err).Errorf("what was written to %s may not be there", t)
		y.s.condemn(ctx, t, fmt.Sprintf("its device reported an error while it was written (%v)", err))
		y.mu.Lock()
		clear(y.pending)
		y.mu.Unlock()
	}
	return err
}

// final syncs everything once when the daemon ends, so that a machine that goes
// down in order loses nothing, captured or not.
func (y *syncer) final(ctx context.Context) {
	all, err := y.s.db.snapshots(ctx)
	if err != nil {
		log.G(ctx).WithError(err).Error("cannot read the database for the last sync")
		return
	}
	all = slices.DeleteFunc(all, func(sn snapshot) bool {
		return sn.Info.Kind != snapshots.KindCommitted || sn.Durable || sn.Damaged != ""
	})
	if len(all) == 0 || y.flush(ctx, placement.NVM) != nil || y.flush(ctx, placement.HDD) != nil {
		return
	}
	for _, sn := range all {
		if err := y.s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Durable = r.Damaged == "" }); err != nil {
			log.G(ctx).WithError(err).Error("cannot record that a layer is durable")
		}
	}
}

// close ends the syncer.
func (y *syncer) close() {
	y.cancel()
	<-y.done
	y.s.rates.save(context.Background())
}
