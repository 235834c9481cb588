// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// onDisk is a bench whose NVM is a directory of a filesystem that has a page cache.
func onDisk(t *testing.T) (b *bench, nvm string) {
	t.Helper()
	requireRoot(t)
	b = &bench{t: t, dir: t.TempDir(), blobs: newBlobs(t)}
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(b.dir, &st))
	if st.Type != unix.EXT4_SUPER_MAGIC {
		t.Skip("the temporary directory is not on ext4, which has uncached writes")
	}
	return b, filepath.Join(b.dir, "nvm")
}

// cached is how many pages of a file are in the page cache.
func cached(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	var all unix.CachestatRange
	var st unix.Cachestat_t
	require.NoError(t, unix.Cachestat(uint(f.Fd()), &all, &st, 0))
	return st.Cache
}

// What went to NVM alone is not cached after the pull, nor after the hole in the
// pack was filled, or the trace of the first start could not tell what it touches.
func TestFilesOnNVMAloneAreNotCached(t *testing.T) {
	b, nvm := onDisk(t)
	s := b.open(func(c *Config) { c.NVMRoot, c.WriteBack = nvm, false })
	blob, diffID := layerOf(t, file{"large", large("a", 2<<20)}, file{"small", large("b", 5000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	path := s.Tiers.DataFile(l.ID.String(), 1)
	require.Eventually(t, func() bool { return cached(t, path) == 0 }, 20*time.Second, time.Millisecond, "pages stay cached that were written")
	require.NotZero(t, cached(t, s.Tiers.DataFile(l.ID.String(), 2)), "a small one may stay")
	require.NoError(t, s.AwaitHome(t.Context(), l.ID))
	require.Zero(t, cached(t, path), "filling the pack has left the file in the cache")
}

// A hot file that the pack has too stays in the cache for the first start.
func TestFilesOnBothTiersStayCached(t *testing.T) {
	b, nvm := onDisk(t)
	s := b.open(func(c *Config) { c.NVMRoot = nvm })
	blob, diffID := layerOf(t, file{"large", large("a", 2<<20)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToBoth))
	require.NotZero(t, cached(t, s.Tiers.DataFile(l.ID.String(), 1)))
}

// Whoever moves files counts them after each layer. That is no reason for another
// plan, which would interrupt the one that is being carried out.
func TestNobodyIsToldOfCounts(t *testing.T) {
	b := newBench(t)
	var told atomic.Int64
	s, err := Open(t.Context(), Config{Root: filepath.Join(b.dir, "hdd"), NVMRoot: filepath.Join(b.dir, "nvm", "n"), Blobs: b.blobs, WriteBack: true},
		func(LayerID, Layer) { told.Add(1) })
	require.NoError(t, err)
	b.s = s
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	b.state(l.ID, Home)
	_, _, err = s.Demote(pack.Ref{Layer: uint64(l.ID), Number: 1}.Redirect(), nil)
	require.NoError(t, err)
	b.idle()
	before := told.Load()
	require.Positive(t, before)
	require.NoError(t, s.Counted(t.Context(), l.ID, 0))
	require.Equal(t, before, told.Load())
	l, err = s.Layer(l.ID)
	require.NoError(t, err)
	require.Zero(t, l.NVM)
	require.NoError(t, s.Close())
	s = b.open(nil)
	l, err = s.Layer(l.ID)
	require.NoError(t, err)
	require.Zero(t, l.NVM, "the database has it")
}

// Holes that nobody is to fill are no work that is waited for.
func TestHolesThatStayAreNoWork(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.WriteBack = false })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	b.state(l.ID, Durable)
	require.Zero(t, s.Work().Holes)
}
