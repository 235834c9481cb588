// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// uncache takes a file out of the page cache.
func uncache(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	require.NoError(t, errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close()))
	_, cached, err := cachedOf(path)
	require.NoError(t, err)
	if cached > 0 {
		t.Skip("this filesystem keeps its pages")
	}
}

// mappedPages touches one page in the middle of a file and returns how many bytes of it are cached then.
func mappedPages(t *testing.T, path string, size int) int64 {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	mapped, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
	require.NoError(t, err)
	require.NotZero(t, mapped[size/2])
	require.NoError(t, errors.Join(unix.Munmap(mapped), f.Close()))
	_, cached, err := cachedOf(path)
	require.NoError(t, err)
	return cached
}

// A start that finds its packs in the page cache is read by small pieces, so that its trace shows what it touched; one that has
// to read the disk is not.
func TestReadAheadOfAStart(t *testing.T) {
	b, nvm := onDisk(t)
	s := b.open(func(c *Config) { c.NVMRoot = nvm })
	const size = 4 << 20
	blob, diffID := layerOf(t, file{"a", large("a", size)}, file{"b", large("b", size)}, file{"c", large("c", size)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	id := b.commit("top", "", l.ID)
	s.Release(l.ID)
	b.state(l.ID, Home)
	view, err := s.View(t.Context(), id, "top")
	require.NoError(t, err)
	at := func(number uint32) string {
		return filepath.Join(view, "h", pack.Ref{Layer: uint64(l.ID), Number: number}.Redirect())
	}
	chain := []LayerID{l.ID}

	uncache(t, s.PackPath(l.ID))
	s.StartBegins(t.Context(), id, chain)
	require.EqualValues(t, pack.ViewReadAhead, mappedPages(t, at(1), size), "the disk is asked as seldom as ever")

	_, err = os.ReadFile(s.PackPath(l.ID))
	require.NoError(t, err)
	s.StartBegins(t.Context(), id, chain)
	require.EqualValues(t, learningAhead, mappedPages(t, at(2), size), "the pack is cached")

	s.StartsEnded(t.Context(), id)
	require.EqualValues(t, pack.ViewReadAhead, mappedPages(t, at(3), size), "nothing is learned any more")
}
