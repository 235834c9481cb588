// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// syncer brings layers to their devices and marks them durable. One sync of a
// filesystem serves all layers that wait for it.
type syncer struct {
	s    *Snapshotter
	wake chan struct{}
	stop chan struct{}
	done chan struct{}

	mu      sync.Mutex
	pending map[string]unsynced
	now     map[string]unsynced // being synced
	meter   *meter
}

type unsynced struct {
	tier  placement.Tier
	bytes int64
}

func newSyncer(s *Snapshotter) *syncer {
	y := &syncer{
		s: s, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
		pending: map[string]unsynced{}, meter: newMeter(s.tiers.Root(placement.HDD)),
	}
	go y.run()
	return y
}

// add queues a captured layer.
func (y *syncer) add(id string, t placement.Tier, bytes int64) {
	y.mu.Lock()
	y.pending[id] = unsynced{t, bytes}
	y.mu.Unlock()
	y.drain()
}

// drain starts writing to the HDD what is dirty there.
func (y *syncer) drain() {
	select {
	case y.wake <- struct{}{}:
	default:
	}
}

// backlog is the bytes of layers that are on the HDD tier but maybe not on the
// disk, and the rate in bytes/s at which the disk takes them, 0 if unknown.
func (y *syncer) backlog() (bytes int64, rate float64) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, m := range []map[string]unsynced{y.pending, y.now} {
		for _, u := range m {
			if u.tier == placement.HDD {
				bytes += u.bytes
			}
		}
	}
	if y.s.config.HDDRate > 0 {
		return bytes, y.s.config.HDDRate
	}
	return bytes, y.meter.rate
}

// waiting is the number of layers that are not durable yet.
func (y *syncer) waiting() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	return len(y.pending) + len(y.now)
}

func (y *syncer) run() {
	defer close(y.done)
	for {
		select {
		case <-y.stop:
			return
		case <-y.wake:
		}
		y.sync(context.Background())
	}
}

func (y *syncer) sync(ctx context.Context) {
	y.mu.Lock()
	batch := y.pending
	y.now, y.pending = batch, map[string]unsynced{}
	y.mu.Unlock()
	onNVM := false
	for _, u := range batch {
		onNVM = onNVM || u.tier == placement.NVM
	}
	var err error
	if onNVM {
		err = y.s.tiers.Sync(placement.NVM)
	}
	if err == nil { // captures stand on HDD whatever the tier of the data
		err = y.s.tiers.Sync(placement.HDD)
	}
	y.mu.Lock()
	y.meter.sample()
	y.mu.Unlock()
	for id := range batch {
		if err != nil {
			break
		}
		err = y.s.db.updateRecord(ctx, id, func(r *record) { r.Durable = true })
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	y.now = nil
	if err != nil {
		log.G(ctx).WithError(err).Error("layers are not durable yet")
		for id, u := range batch { // the next drain tries again
			if _, ok := y.pending[id]; !ok {
				y.pending[id] = u
			}
		}
		return
	}
	if len(batch) > 0 {
		y.s.mirror.changed()
		y.s.homing.kick()
	}
}

func (y *syncer) close() {
	close(y.stop)
	<-y.done
}

// meter measures the rate at which a disk takes data: bytes written over the
// time it was busy, by the kernel's counters of the device
// (Documentation/block/stat.rst).
type meter struct {
	stat          string // "" where the filesystem has no single device
	sectors, busy uint64
	rate          float64
}

func newMeter(dir string) *meter {
	m := &meter{}
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil {
		path := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
		if _, err := os.Stat(path); err == nil {
			m.stat = path
			m.sectors, m.busy, _ = m.read()
		}
	}
	return m
}

// sample takes the counters in. Little data says little of the rate.
func (m *meter) sample() {
	const least = 4 << 20
	if m.stat == "" {
		return
	}
	sectors, busy, err := m.read()
	if err != nil {
		return
	}
	bytes := float64(sectors-m.sectors) * 512
	if bytes < least || busy <= m.busy {
		return
	}
	m.rate = ewma(m.rate, bytes/(float64(busy-m.busy)/1000))
	m.sectors, m.busy = sectors, busy
}

// read returns the sectors of 512 bytes written and the milliseconds in which
// the device had something to do.
func (m *meter) read() (sectors, busy uint64, err error) {
	b, err := os.ReadFile(m.stat)
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 10 {
		return 0, 0, fmt.Errorf("%s: %d fields", m.stat, len(f))
	}
	if sectors, err = strconv.ParseUint(f[6], 10, 64); err != nil {
		return 0, 0, err
	}
	busy, err = strconv.ParseUint(f[9], 10, 64)
	return sectors, busy, err
}

// mirror keeps a copy of the database on HDD, at most a moment old.
type mirror struct {
	db   *database
	path string
	wake chan struct{}
	stop chan struct{}
	done chan error
}

// mirrorDelay gathers the changes of one pull or start into few copies.
const mirrorDelay = 500 * time.Millisecond

func newMirror(db *database, path string) *mirror {
	m := &mirror{db: db, path: path, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan error, 1)}
	go m.run()
	return m
}

// changed tells that the database has changed.
func (m *mirror) changed() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *mirror) run() {
	ctx := context.Background()
	for {
		select {
		case <-m.stop:
			m.done <- m.db.copyTo(ctx, m.path)
			return
		case <-m.wake:
		}
		select {
		case <-m.stop:
			m.done <- m.db.copyTo(ctx, m.path)
			return
		case <-time.After(mirrorDelay):
		}
		if err := m.db.copyTo(ctx, m.path); err != nil {
			log.G(ctx).WithError(err).Error("the copy of the database on HDD is out of date")
		}
	}
}

func (m *mirror) close() error {
	close(m.stop)
	return <-m.done
}
