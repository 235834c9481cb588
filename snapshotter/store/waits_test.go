// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// await waits for a layer, and not for ever.
func (b *bench) await(id LayerID) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	_, err := b.s.Await(ctx, id)
	require.NoError(b.t, err)
}

// directory commits a directory on a parent, which is packed in the background.
func (b *bench) directory(name, parent string) LayerID {
	b.t.Helper()
	b.stage(name+"-active", parent, placement.HDD, func(dir string) {
		require.NoError(b.t, os.WriteFile(filepath.Join(dir, name), large(name, 9000), 0o644))
	})
	return b.commitPath(name+"-active", name)
}

// A directory was committed on a layer that cannot be had for now: the only worker does other things meanwhile.
func TestWorkersWaitForNoParent(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.Workers = 1 })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	var works atomic.Bool
	b.blobs.registry = func(context.Context) (io.ReadCloser, error) {
		if works.Load() {
			return io.NopCloser(bytes.NewReader(blob)), nil
		}
		return nil, errors.New("connection refused")
	}
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.lost(s, blob, l)
	layer, err := s.layer(l.ID)
	require.NoError(t, err)
	b.eventually("it was asked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		layer.refetch.until = time.Now().Add(time.Hour)
		return layer.refetch.err != nil
	})
	first, second := b.directory("first", "top"), b.directory("second", "first")
	for range 10 {
		s.TrafficChanged()
	}
	b.await(b.directory("other", ""))
	b.idle()
	works.Store(true)
	s.mu.Lock()
	layer.refetch.until = time.Time{}
	s.mu.Unlock()
	b.await(l.ID)
	for _, id := range []LayerID{first, second} {
		s.exec.kick(id) // its next try may be some seconds away
		b.eventually("layer "+id.String()+" is packed", func() bool { l, err := s.Layer(id); return err == nil && l.readable() })
	}
}

// pulling is traffic that never ends once it has begun.
type pulling struct{ begun atomic.Bool }

func (p *pulling) Pulling() bool  { return p.begun.Load() }
func (p *pulling) Starting() bool { return false }

// Pulls go on while a pack is being filled. No worker waits for that, and a layer that goes meanwhile goes at once.
func TestWorkersWaitForNoFilling(t *testing.T) {
	b := newBench(t)
	var pulls pulling
	s := b.open(func(c *Config) { c.Workers, c.Traffic, c.WriteBackRate = 1, &pulls, 1<<20 })
	blob, diffID := layerOf(t, file{"a", large("a", 12<<20)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	b.commit("top", "", l.ID)
	s.Release(l.ID)
	b.eventually("it is being filled", func() bool {
		s.exec.lanes[fill].mu.Lock()
		defer s.exec.lanes[fill].mu.Unlock()
		return s.exec.lanes[fill].active[l.ID]
	})
	pulls.begun.Store(true)
	for range 10 {
		s.TrafficChanged()
	}
	b.await(b.directory("other", ""))
	b.remove("top")
	b.gone(l.ID)
}

// A client has committed a layer by itself, and containerd's collector was faster than our unpacking: the layer is had in
// another way, though nobody waits for its blob to come.
func TestBlobThatGoesBeforeItsUnpacking(t *testing.T) {
	for _, waits := range []bool{false, true} {
		b := newBench(t)
		s := b.open(nil)
		blob, diffID := layerOf(t, file{"a", large("a", 9000)})
		b.blobs.registry = func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }
		sp := spec(blob, diffID, unpack.ToPack)
		gate, passed := make(chan struct{}), make(chan struct{})
		if waits {
			close(gate)
		}
		sp.Gate = func(ctx context.Context) error {
			select {
			case <-gate:
				close(passed)
			case <-ctx.Done():
			}
			return ctx.Err()
		}
		id, _, err := s.Begin(t.Context(), sp)
		require.NoError(t, err)
		if waits {
			<-passed
		}
		b.commit("top", "", id)
		s.Release(id)
		if !waits {
			close(gate)
		}
		b.await(id)
		b.state(id, Home)
	}
}

// Two namespaces pull the same layer and the blob comes in the second one.
func TestBlobComesInAnotherNamespace(t *testing.T) {
	b := newBench(t)
	b.blobs.hidden, b.blobs.in = true, "second"
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	for _, ns := range []string{"first", "second"} {
		sp := spec(blob, diffID, unpack.ToPack)
		sp.Namespace = ns
		_, _, err := s.Begin(t.Context(), sp)
		require.NoError(t, err)
	}
	b.blobs.write(t, blob)
	b.blobs.tell()
	l, ok := s.Find(desc(blob).Digest)
	require.True(t, ok)
	b.await(l.ID)
}

// A pull joins the unpacking of one that has just been given up.
func TestUnpackingThatIsJustCancelled(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	at, on := make(chan struct{}), make(chan struct{})
	sp := spec(blob, diffID, unpack.ToPack)
	sp.Place = func(unpack.File) unpack.Placement {
		close(at)
		<-on
		return unpack.ToPack
	}
	var release sync.Once
	defer release.Do(func() { close(on) })
	id, _, err := s.Begin(t.Context(), sp)
	require.NoError(t, err)
	<-at
	s.Release(id)
	again, fresh, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToPack))
	require.NoError(t, err)
	require.Equal(t, id, again)
	require.False(t, fresh)
	release.Do(func() { close(on) })
	b.await(id)
}

// containerd collects a layer that is used again before it could be removed.
func TestCleanupOfALayerThatIsUsedAgain(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.commit("a", "", l.ID)
	b.state(l.ID, Home)
	layer, err := s.layer(l.ID)
	require.NoError(t, err)
	b.eventually("nobody works on it", layer.run.TryLock)
	b.remove("a")
	s.Release(l.ID)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	looked := make(chan struct{})
	go func() {
		close(looked)
		done <- s.WaitRemoved(ctx)
	}()
	<-looked
	b.commit("again", "", l.ID)
	require.NoError(t, <-done)
	layer.run.Unlock()
}
