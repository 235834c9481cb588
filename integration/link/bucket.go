// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"sync"
	"time"
)

// bucket is the one wire that all connections share. Each chunk reserves its transmission time behind the chunks
// reserved before it, so that connections with data to send share the rate evenly and an idle wire saves nothing up.
type bucket struct {
	mu   sync.Mutex
	rate float64 // bytes a second; 0: no limit
	free time.Time
}

// reserve books n bytes at now and returns when the last of them has left the wire.
func (b *bucket) reserve(now time.Time, n int) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.free.Before(now) {
		b.free = now
	}
	if b.rate > 0 {
		b.free = b.free.Add(time.Duration(float64(n) / b.rate * float64(time.Second)))
	}
	return b.free
}

func (b *bucket) setRate(bytesPerSecond float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rate = bytesPerSecond
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
