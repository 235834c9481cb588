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
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// lost is a layer with a snapshot, whose pack has a wrong bit and whose blob containerd does not have any more.
func (b *bench) lost(s *Store, blob []byte, l Layer) (view string) {
	b.t.Helper()
	view = b.commit("top", "", l.ID)
	b.state(l.ID, Home)
	s.Release(l.ID)
	info, err := os.Stat(s.PackPath(l.ID))
	require.NoError(b.t, err)
	require.NoError(b.t, b.blobs.Delete(b.t.Context(), desc(blob).Digest)) // first: the executor may look at any time
	flip(b.t, s.PackPath(l.ID), info.Size()-1)
	_, err = s.Metas(b.t.Context(), []LayerID{l.ID})
	require.ErrorIs(b.t, err, errdefs.ErrDataLoss)
	return view
}

func TestLostBlobIsFetchedAgain(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	data := large("a", 9000)
	blob, diffID := layerOf(t, file{"a", data})
	b.blobs.write(t, blob)
	asked := make(chan struct{})
	let := make(chan struct{})
	b.blobs.registry = func(ctx context.Context) (io.ReadCloser, error) {
		close(asked)
		select {
		case <-let:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return io.NopCloser(bytes.NewReader(blob)), nil
	}
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	id := b.lost(s, blob, l)
	// Nobody has to ask for it.
	<-asked
	require.Contains(t, s.Trouble(l.ID, ""), "it is being unpacked anew; wait")
	close(let)
	b.state(l.ID, Home)
	require.Empty(t, s.Trouble(l.ID, ""))
	view, err := s.View(t.Context(), id, "top")
	require.NoError(t, err)
	b.read(view, func(root string) {
		got, err := os.ReadFile(filepath.Join(root, "a"))
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	})
}

// While the registry gives nothing, all who need the layer are told why and what to do, and it is asked now and then.
func TestRegistryThatGivesNothing(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	var asked atomic.Int32
	var works atomic.Bool
	b.blobs.registry = func(context.Context) (io.ReadCloser, error) {
		asked.Add(1)
		if works.Load() {
			return io.NopCloser(bytes.NewReader(blob)), nil
		}
		return nil, errors.New("connection refused; really")
	}
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.lost(s, blob, l)
	layer, err := s.layer(l.ID)
	require.NoError(t, err)
	pause := func(until time.Time) {
		s.mu.Lock()
		layer.refetch.until = until
		s.mu.Unlock()
	}
	b.eventually("it was asked", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return layer.refetch.err != nil })
	pause(time.Now().Add(time.Hour))
	before := asked.Load()
	for range 20 {
		_, err := s.Await(t.Context(), l.ID)
		require.ErrorIs(t, err, errdefs.ErrDataLoss)
		require.False(t, errdefs.IsNotFound(err))
		require.ErrorContains(t, err, "layer "+l.ID.String()+" cannot be used: ")
		require.ErrorContains(t, err, "connection refused, really; fetch it by hand: ctr -n default content fetch registry/app:1: data loss")
	}
	require.Equal(t, before, asked.Load(), "20 starts ask the registry not once")
	require.Contains(t, s.Trouble(l.ID, "k8s.io", "app:2", "app:3"), "; fetch it by hand: ctr -n k8s.io content fetch app:2")
	works.Store(true)
	pause(time.Time{})
	_, err = s.Await(t.Context(), l.ID)
	require.NoError(t, err)

	// A blob that comes to containerd by another way is taken from there.
	works.Store(false)
	b.blobs.write(t, blob)
	require.NoError(t, s.markDamaged(t.Context(), l.ID, "for a test"))
	_, err = s.Await(t.Context(), l.ID)
	require.NoError(t, err)
}

// Of a layer that no image names any more the cure is to fetch any image that has it.
func TestLostBlobOfNoImage(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.lost(s, blob, l)
	_, err := s.Await(t.Context(), l.ID)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	require.ErrorContains(t, err, "no image has it")
	require.ErrorContains(t, err, "ctr -n default content fetch, of an image that has blob "+desc(blob).Digest.String())
}

// A layer under which its registry is slow does not keep the executor: others are worked on, and it goes when it is removed.
func TestSlowRegistryKeepsNobody(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.Workers = 1 })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	b.blobs.registry = func(ctx context.Context) (io.ReadCloser, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.lost(s, blob, l)
	b.eventually("it is fetched", func() bool { return s.Work().Unpacking == 1 })
	other, otherDiff := layerOf(t, file{"b", large("b", 9000)})
	b.blobs.write(t, other)
	o := b.begin(spec(other, otherDiff, unpack.ToNVM))
	b.state(o.ID, Home)
	b.remove("top")
	b.gone(l.ID)
}

// Somebody has deleted a file on NVM that the pack does not have yet.
func TestMissingFileIsUnpackedAnew(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.WriteBack = false })
	data := large("a", 9000)
	blob, diffID := layerOf(t, file{"a", data})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	id := b.commit("top", "", l.ID)
	b.state(l.ID, Durable)
	require.NoError(t, os.Remove(s.Tiers.DataFile(l.ID.String(), 1)))
	require.NoError(t, s.AwaitHome(t.Context(), l.ID))
	view, err := s.View(t.Context(), id, "top")
	require.NoError(t, err)
	b.read(view, func(root string) {
		got, err := os.ReadFile(filepath.Join(root, "a"))
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	})
	s.Release(l.ID)
}
