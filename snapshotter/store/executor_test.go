// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// traffic is what the test says it is.
type traffic struct{ starting atomic.Bool }

func (t *traffic) Pulling() bool { return false }

func (t *traffic) Starting() bool { return t.starting.Load() }

// storedDuringAStart opens a store during a start that ends when the test says so, with a layer that waits for that.
func (b *bench) storedDuringAStart() (*traffic, Layer) {
	b.t.Helper()
	var starts traffic
	starts.starting.Store(true)
	s := b.open(func(c *Config) { c.Traffic = &starts })
	blob, diffID := layerOf(b.t, file{"a", large("a", 9000)})
	b.blobs.write(b.t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	b.commit("a", "", l.ID)
	s.Release(l.ID)
	b.eventually("the store has looked", func() bool { return s.exec.waits.Load() && s.exec.length() == 0 })
	return &starts, l
}

// A start ends when nothing is opened any more, of which nobody tells the store.
func TestWorkGoesOnAfterAStart(t *testing.T) {
	b := newBench(t)
	starts, l := b.storedDuringAStart()
	now, err := b.s.Layer(l.ID)
	require.NoError(t, err)
	require.Equal(t, Stored, now.State)
	starts.starting.Store(false)
	b.state(l.ID, Home)
}

// Starts and pulls follow on each other all day: images become durable all the same.
func TestSyncDoesNotWaitForEver(t *testing.T) {
	b := newBench(t)
	_, l := b.storedDuringAStart()
	b.s.mu.Lock()
	b.s.layers[l.ID].stored = time.Now().Add(-2 * syncLatest)
	b.s.mu.Unlock()
	b.state(l.ID, Durable)
}

// containerd collects while a pull that failed still holds its layers for the next try.
func TestCleanupWaitsForNoPull(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.commit("a", "", l.ID)
	b.remove("a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	require.NoError(t, s.WaitRemoved(ctx))
	s.Release(l.ID)
	require.NoError(t, s.WaitRemoved(ctx))
	b.gone(l.ID)
}
