// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"sync"
	"time"
)

// catchUp is how much lost time a transfer may make up for. A timer fires about a millisecond late, and later on a busy
// machine; on a real link the buffers of the sender keep the wire busy meanwhile. At 1 Gbit/s 10 ms are 1.25 MB, less
// than what TCP lets a connection have on its way by default (net.ipv4.tcp_wmem and tcp_rmem: 4 and 6 MiB).
const catchUp = 10 * time.Millisecond

// wire is what all connections share. Each chunk reserves its transmission time behind the chunks reserved before it, so
// that connections with data to send share the rate evenly. No two reservations overlap: within any time d, the wire
// carries at most what fits into d + catchUp.
type wire struct {
	mu   sync.Mutex
	rate float64 // bytes a second; 0: no limit
	free time.Time
}

// reserve books n bytes that are ready to be sent at the given time and returns when the last of them has left the wire.
func (w *wire) reserve(ready time.Time, n int) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.free.Before(ready) {
		w.free = ready
	}
	if w.rate > 0 {
		w.free = w.free.Add(time.Duration(float64(n) / w.rate * float64(time.Second)))
	}
	return w.free
}

func (w *wire) setRate(bytesPerSecond float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rate = bytesPerSecond
}

// flow is one transfer over a wire. It is used by one goroutine.
type flow struct {
	wire *wire
	due  time.Time // when its last chunk had left the wire; zero before the first
}

// send books n bytes at now and returns when they have left the wire. The caller may come late, because its sleep took
// longer than asked or because it had to fetch the bytes: they count as ready since the last chunk was due, but for
// no longer than catchUp. The first chunk is ready now, since a wire that idles saves nothing up.
func (f *flow) send(now time.Time, n int) time.Time {
	ready := now
	if earliest := now.Add(-catchUp); !f.due.IsZero() && f.due.Before(now) {
		ready = f.due
		if ready.Before(earliest) {
			ready = earliest
		}
	}
	f.due = f.wire.reserve(ready, n)
	return f.due
}

// sleepUntil returns early with the context's error when ctx ends.
func sleepUntil(ctx context.Context, t time.Time) error {
	wait := time.Until(t)
	if wait <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
