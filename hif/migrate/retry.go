// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"time"

	"github.com/containerd/log"
)

// A failure is tried again after a pause that doubles each time.
const (
	firstRetry = 30 * time.Second
	lastRetry  = time.Hour
)

type failure struct {
	err       error
	at, until time.Time
	pause     time.Duration
}

// noRoom is the name under which promotions that found no room are tried again.
const noRoom = ""

// due tells whether a layer or file may be tried (again).
func (r *run) due(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.failing[name]
	return f == nil || !time.Now().Before(f.until)
}

// result keeps what became of a layer or a file.
func (r *run) result(name string, err error) {
	r.change(func() {
		if err == nil {
			delete(r.failing, name)
			return
		}
		f := r.failing[name]
		if f == nil {
			f = &failure{}
			r.failing[name] = f
		}
		f.pause = min(lastRetry, max(r.config.retry, 2*f.pause))
		f.err, f.at = err, time.Now()
		f.until = f.at.Add(f.pause)
		r.stats.Failures++
	})
	if err != nil {
		log.L.WithError(err).WithField("again", r.failingPause(name)).Warn("migration: not done, trying again later")
	}
}

func (r *run) failingPause(name string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.failing[name]; f != nil {
		return f.pause
	}
	return 0
}
