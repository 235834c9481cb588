// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCPUOfCountsChildrenThatHaveEnded(t *testing.T) {
	before, err := CPUOf(os.Getpid())
	require.NoError(t, err)
	var children time.Duration
	for children < 200*time.Millisecond {
		child := exec.CommandContext(t.Context(), "sh", "-c", "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done")
		require.NoError(t, child.Run())
		children += child.ProcessState.UserTime() + child.ProcessState.SystemTime()
	}
	after, err := CPUOf(os.Getpid())
	require.NoError(t, err)
	// The kernel rounds each of the four numbers down to a tick.
	require.GreaterOrEqual(t, after-before, children-4*clockTick)
}

func TestCachedShare(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	share, err := CachedShare([]string{path})
	require.NoError(t, err)
	require.Greater(t, share, 0.9)
	_, err = CachedShare([]string{path, path + "-"})
	require.ErrorIs(t, err, fs.ErrNotExist)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)))
	if share, err = CachedShare([]string{path}); share > 0.9 {
		t.Skip("this filesystem keeps its pages")
	}
	require.NoError(t, err)
	require.Zero(t, share)
}

func TestScheduled(t *testing.T) {
	ran, waited, err := Scheduled(os.Getpid())
	require.NoError(t, err)
	for begun := time.Now(); time.Since(begun) < 10*time.Millisecond; {
	}
	later, longer, err := Scheduled(os.Getpid())
	require.NoError(t, err)
	require.Greater(t, later+longer, ran+waited)
	require.GreaterOrEqual(t, longer, waited)
	_, _, err = Scheduled(1 << 30)
	require.ErrorIs(t, err, fs.ErrNotExist)
}
