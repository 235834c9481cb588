// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package block

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestLoopWithFilesystemGoesWithItsDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	t.Cleanup(func() { _ = UnmountBelow(dir); _ = DetachBelow(dir) })
	img := filepath.Join(dir, "disk.img")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, 16<<20))

	loop, err := Attach(img)
	require.NoError(t, err)
	sys := filepath.Join("/sys/block", filepath.Base(loop.Path()))
	for file, want := range map[string]string{"loop/dio": "1", "queue/read_ahead_kb": "128", "loop/backing_file": img} {
		got, err := os.ReadFile(filepath.Join(sys, file))
		require.NoError(t, err)
		require.Equal(t, want, strings.TrimSpace(string(got)), file)
	}
	require.NoError(t, MakeExt4(t.Context(), loop.Path()))
	mnt := filepath.Join(dir, "mnt")
	require.NoError(t, Mount(loop.Path(), mnt, "ext4", unix.MS_NOATIME, ""))
	require.NoError(t, loop.Close())
	require.NoError(t, os.WriteFile(filepath.Join(mnt, "f"), []byte("x"), 0o600), "the mount keeps the device")
	require.NoError(t, Mount("none", filepath.Join(mnt, "inner"), "tmpfs", 0, ""))

	busy, err := os.Open(filepath.Join(mnt, "f"))
	require.NoError(t, err)
	require.NoError(t, UnmountBelow(dir), "a busy mount is no hindrance")
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	require.Empty(t, infos)
	require.NoError(t, busy.Close())
	require.NoError(t, DetachBelow(dir))
	backing, err := os.ReadFile(filepath.Join(sys, "loop/backing_file"))
	require.False(t, err == nil && strings.TrimSpace(string(backing)) == img, "the device is still attached")
}

func TestUnmountOfNothing(t *testing.T) {
	require.NoError(t, Unmount(filepath.Join(t.TempDir(), "missing")))
	require.NoError(t, Unmount(t.TempDir()))
	require.NoError(t, UnmountBelow(t.TempDir()))
}

func TestAttachMissingFile(t *testing.T) {
	_, err := Attach(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "missing")
}
