// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"sync"
	"time"

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
	tier  placement.Tier
	left  int64 // bytes that may still be in the page cache
	out   bool  // written out
	since time.Time
}

const (
	// syncLatest is how long a captured layer waits for its sync while pulls go on.
	syncLatest = 15 * time.Second
	// syncRetry is when a sync that failed is tried again.
	syncRetry = 5 * time.Second
)

func newSyncer(s *Snapshotter) *syncer {
	ctx, cancel := context.WithCancel(context.Background())
	y := &syncer{s: s, wake: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{}), pending: map[string]*unsynced{}}
	go y.run(ctx)
	return y
}

// add queues a captured layer.
func (y *syncer) add(id string, t placement.Tier, bytes int64) {
	y.mu.Lock()
	y.pending[id] = &unsynced{id: id, tier: t, left: bytes, since: time.Now()}
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
		var again <-chan time.Time
		if y.waiting() > 0 {
			again = time.After(syncRetry)
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
		if y.due() {
			y.sync(ctx)
		}
	}
}

// next is a layer to be written out, nil if there is none or no pull to spare.
func (y *syncer) next() *unsynced {
	if !y.s.placer.storing() {
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
		if !y.s.placer.storing() {
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

// due tells whether layers wait for their sync and no pull would suffer from it.
func (y *syncer) due() bool {
	busy := y.s.placer.storing()
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
	var err error
	if onNVM {
		err = y.s.tiers.Sync(placement.NVM)
	}
	if err == nil { // captures stand on HDD whatever the tier of the data
		err = y.s.tiers.Sync(placement.HDD)
	}
	for _, u := range batch {
		if err == nil {
			err = y.s.db.updateRecord(ctx, u.id, func(r *record) { r.Durable = true })
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("layers are not durable yet")
		return // run tries again
	}
	y.mu.Lock()
	for _, u := range batch {
		if y.pending[u.id] == u {
			delete(y.pending, u.id)
		}
	}
	y.mu.Unlock()
	log.G(ctx).WithField("layers", len(batch)).Debug("durable")
	y.s.mirror.changed()
	y.s.homing.kick()
}

func (y *syncer) close() {
	y.cancel()
	<-y.done
}
