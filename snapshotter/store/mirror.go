// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
)

// mirror keeps a copy of the database on HDD, at most a moment old.
type mirror struct {
	db   *database
	path string
	busy func() bool
	wake chan struct{}
	stop chan struct{}
	done chan error

	want, have atomic.Int64 // changes, and those that the copy has
	copying    sync.Mutex   // else an older copy could replace a newer one
}

const (
	// mirrorDelay gathers the changes of one start into one copy.
	mirrorDelay = 500 * time.Millisecond
	// mirrorLatest bounds how long pulls, whose own writes to the disk go first, and
	// starts, which may wait for it, put the copy off.
	mirrorLatest = 30 * time.Second
)

// newMirror copies db to path whenever it has changed and busy tells that no
// pull and no start is going on.
func newMirror(db *database, path string, busy func() bool) *mirror {
	m := &mirror{db: db, path: path, busy: busy, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan error, 1)}
	go m.run()
	return m
}

// changed tells that the database has changed.
func (m *mirror) changed() {
	m.want.Add(1)
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
			m.done <- m.copy(ctx)
			return
		case <-m.wake:
		}
		for start := time.Now(); ; {
			select {
			case <-m.stop:
				m.done <- m.copy(ctx)
				return
			case <-time.After(mirrorDelay):
			}
			if !m.busy() || time.Since(start) > mirrorLatest {
				break
			}
		}
		if err := m.flush(ctx); err != nil {
			log.G(ctx).WithError(err).Error("the copy of the database on HDD is out of date")
		}
	}
}

func (m *mirror) copy(ctx context.Context) error {
	m.copying.Lock()
	defer m.copying.Unlock()
	now := m.want.Load()
	if err := m.db.copyTo(ctx, m.path); err != nil {
		return err
	}
	m.have.Store(now)
	return nil
}

// flush returns when the copy has all changes that were told before the call.
func (m *mirror) flush(ctx context.Context) error {
	if m.waiting() == 0 {
		return nil
	}
	return m.copy(ctx)
}

// waiting tells how many changes the copy lacks.
func (m *mirror) waiting() int64 { return m.want.Load() - m.have.Load() }

func (m *mirror) close() error {
	close(m.stop)
	return <-m.done
}
