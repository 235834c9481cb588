// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// After a loss of NVM each pod of a node asks for its view. No more are merged at a time than there are workers, whoever waits.
func TestMergesAreBounded(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const workers, views = 2, 100
	s := b.open(func(c *Config) { c.Workers = workers })
	blob, diffID := layerOf(t, file{"a", []byte("a")})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	var mu sync.Mutex
	running, most, done := 0, 0, 0
	entered, goOn := make(chan struct{}, views), make(chan struct{})
	s.views.write = func(ctx context.Context, c pack.Chain, blocks map[uint64]uint32, path string) error {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		entered <- struct{}{}
		<-goOn
		mu.Lock()
		running--
		done++
		mu.Unlock()
		return writeView(ctx, c, blocks, path)
	}
	var asking sync.WaitGroup
	for i := range views {
		name := fmt.Sprintf("image-%d", i)
		snapshot := b.commit(name, "", l.ID)
		asking.Go(func() {
			if _, err := s.View(t.Context(), snapshot, name); err != nil {
				t.Error(err)
			}
		})
	}
	s.Release(l.ID)
	b.eventually("all views are asked for", func() bool {
		s.jobs.mu.Lock()
		defer s.jobs.mu.Unlock()
		return s.jobs.running == views
	})
	for i := range views {
		<-entered
		if i >= workers-1 { // as many run as may
			goOn <- struct{}{}
		}
	}
	close(goOn)
	asking.Wait()
	require.Equal(t, workers, most)
	require.Equal(t, views, done)
}

// However many files a layer has, it is one on HDD, and its removal one unlink: no other removal waits for it.
func TestRemovalOfALayerIsOneFile(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.open(nil)
	files := func() (n int) {
		for _, dir := range []string{filepath.Join(b.dir, "hdd", "p"), s.Tiers.DataRoot()} {
			require.NoError(t, filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { n++; return nil }))
		}
		return n
	}
	before := files()
	var many []file
	for i := range 2000 {
		many = append(many, file{fmt.Sprintf("f%d", i), fmt.Appendf(nil, "%d", i)})
	}
	var layers []LayerID
	for _, content := range [][]file{{{"one", []byte("1")}}, many} {
		blob, diffID := layerOf(t, content...)
		b.blobs.write(t, blob)
		l := b.begin(spec(blob, diffID, unpack.ToPack))
		b.commit(l.ID.String(), "", l.ID)
		s.Release(l.ID)
		b.state(l.ID, Home)
		layers = append(layers, l.ID)
		require.Equal(t, before+len(layers), files(), "one file a layer")
	}
	for _, id := range layers {
		b.remove(id.String())
		b.gone(id)
	}
	require.Equal(t, before, files())
}

// A removal that somebody waits for waits for no worker: those may be busy with directories of 100 000 files.
func TestRemovalDoesNotWaitForWorkers(t *testing.T) {
	t.Parallel()
	j := newJobs(2)
	defer j.close()
	held := make(chan struct{})
	defer close(held)
	begun := make(chan struct{})
	for i := range 2 {
		j.add(fmt.Sprintf("large %d", i), func(context.Context) error { begun <- struct{}{}; <-held; return nil })
		<-begun
	}
	j.add("small", func(context.Context) error { return nil })
	require.NoError(t, j.do(t.Context(), "small", func(context.Context) error { return nil }))
}
