// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Each inode counts once, and what is linked from outside or through symlinks not at all.
func TestWrittenCountsAsContinuity(t *testing.T) {
	dir := t.TempDir()
	for i := range 3000 {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(i%7)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i%7), fmt.Sprint(i)), make([]byte, i), 0o644))
	}
	require.NoError(t, os.Link(filepath.Join(dir, "1/2997"), filepath.Join(dir, "linked")))
	require.NoError(t, os.Symlink("/usr", filepath.Join(dir, "0/usr")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	have, err := written(t.Context(), dir)
	require.NoError(t, err)
	want, err := fs.DiskUsage(t.Context(), dir)
	require.NoError(t, err)
	require.Equal(t, snapshots.Usage(want), have)

	_, err = written(t.Context(), filepath.Join(dir, "none"))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = written(ended, dir)
	require.ErrorIs(t, err, context.Canceled)
}

// A directory may be deeper than a path can be long.
func TestWrittenBeyondPathMax(t *testing.T) {
	dir := t.TempDir()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	name, at := strings.Repeat("n", 200), root
	const depth = 30
	for range depth {
		require.NoError(t, unix.Mkdirat(at, name, 0o755))
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(at))
		at = next
	}
	require.NoError(t, unix.Close(at))
	have, err := written(t.Context(), dir)
	require.NoError(t, err)
	require.EqualValues(t, depth+1, have.Inodes)
}

// A container that makes and removes files meanwhile spoils no count.
func TestWrittenWhileFilesVanish(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "stays"), make([]byte, 1<<20), 0o644))
	stop := make(chan struct{})
	var busy sync.WaitGroup
	var failed error
	busy.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			sub := filepath.Join(dir, fmt.Sprint("sub", i%10))
			failed = errors.Join(failed, os.MkdirAll(filepath.Join(sub, "a/b"), 0o755), os.WriteFile(filepath.Join(sub, "a/f"), nil, 0o644), os.RemoveAll(sub))
		}
	})
	for range 200 {
		have, err := written(t.Context(), dir)
		require.NoError(t, err)
		require.GreaterOrEqual(t, have.Size, int64(1<<20))
	}
	close(stop)
	busy.Wait()
	require.NoError(t, failed)
}
