// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// mountLoop makes a filesystem on a loop device of a sparse file and mounts it.
func mountLoop(t *testing.T, options string, mkfs ...string) string {
	t.Helper()
	requireRoot(t)
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 320<<20)) // the least that mkfs.xfs takes is 300 MB
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skipf("%s is not installed", mkfs[0])
	}
	out, err := exec.Command(mkfs[0], append(mkfs[1:], image)...).CombinedOutput()
	require.NoError(t, err, string(out))
	out, err = exec.Command("mount", "-o", "loop,"+options, image, dir).CombinedOutput()
	if err != nil && strings.Contains(options, "quota") {
		t.Skipf("this kernel has no project quotas for %s: %s", mkfs[0], out)
	}
	require.NoError(t, err, string(out))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func mountTmpfs(t *testing.T, flags uintptr) string {
	t.Helper()
	requireRoot(t)
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", flags, "size=1m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func TestFactsOfTmpfs(t *testing.T) {
	dir := mountTmpfs(t, 0)
	d, err := Facts(dir)
	require.NoError(t, err)
	require.Equal(t, "tmpfs", d.Filesystem)
	require.Equal(t, dir, d.MountPoint)
	require.Equal(t, int64(1<<20), d.Total)
	require.False(t, d.ReadOnly)
	require.Equal(t, No, d.Rotational)
	require.Equal(t, No, d.DAX)

	above, err := Facts(filepath.Dir(dir))
	require.NoError(t, err)
	require.False(t, d.SameFilesystem(above))
	require.True(t, d.SameFilesystem(d))

	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestFactsOfReadOnly(t *testing.T) {
	d, err := Facts(mountTmpfs(t, unix.MS_RDONLY))
	require.NoError(t, err)
	require.True(t, d.ReadOnly)
	require.Equal(t, Unknown, d.DAX)
}

func TestFactsOfLoop(t *testing.T) {
	dir := mountLoop(t, "noatime", "mkfs.ext4", "-q", "-F")
	d, err := Facts(dir)
	require.NoError(t, err)
	require.Equal(t, "ext4", d.Filesystem)
	require.Contains(t, d.Source, "/dev/loop")
	require.Contains(t, d.Options, "noatime")
	backing, err := Facts(filepath.Dir(dir))
	require.NoError(t, err)
	require.Equal(t, backing.Rotational, d.Rotational)
	require.NoError(t, os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(d.Dev), unix.Minor(d.Dev)), []byte("2560"), 0o644))
	d, err = Facts(dir)
	require.NoError(t, err)
	require.EqualValues(t, 2560<<10, d.ReadAhead)
}

func TestFactsOfNothing(t *testing.T) {
	_, err := Facts(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Facts(file)
	require.ErrorIs(t, err, unix.ENOTDIR)
}

func TestFindMount(t *testing.T) {
	var d Dir
	d.findMount("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n22 1 259:0 / /mnt/a\\040b rw,noatime shared:3 - xfs /dev/pmem0 rw,dax=always\n", 22)
	require.Equal(t, "/mnt/a b", d.MountPoint)
	require.Equal(t, "xfs", d.Filesystem)
	require.Equal(t, "/dev/pmem0", d.Source)
	require.Contains(t, d.Options, "dax=always")
	var none Dir
	none.findMount("garbage\n22 - \n", 22)
	require.Equal(t, Dir{}, none)
}

func TestExisting(t *testing.T) {
	dir := t.TempDir()
	have, err := Existing(filepath.Join(dir, "a", "b"))
	require.NoError(t, err)
	require.Equal(t, dir, have)
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Existing(filepath.Join(file, "below"))
	require.Error(t, err)
}

func TestProjectQuota(t *testing.T) {
	for _, fs := range []struct {
		name, options string
		mkfs          []string
	}{
		{"ext4", "prjquota", []string{"mkfs.ext4", "-q", "-F", "-O", "project,quota"}},
		{"xfs", "prjquota", []string{"mkfs.xfs", "-q"}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			dir := mountLoop(t, fs.options, fs.mkfs...)
			require.NoError(t, TryProjectQuota(dir))
			left, err := filepath.Glob(filepath.Join(dir, ".quota-*"))
			require.NoError(t, err)
			require.Empty(t, left)

			limited := filepath.Join(dir, "limited")
			require.NoError(t, os.Mkdir(limited, 0o755))
			require.NoError(t, SetProjectQuota(limited, 77, 1<<20))
			require.NoError(t, os.WriteFile(filepath.Join(limited, "fits"), make([]byte, 512<<10), 0o600))
			require.Error(t, unprivileged(func() error {
				return os.WriteFile(filepath.Join(limited, "full"), make([]byte, 1<<20), 0o600)
			}))
			used, err := ProjectUsage(dir, 77)
			require.NoError(t, err)
			require.GreaterOrEqual(t, used, int64(512<<10))
			require.LessOrEqual(t, used, int64(1<<20))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "outside"), make([]byte, 2<<20), 0o600))
		})
	}
}

func TestNoProjectQuota(t *testing.T) {
	require.ErrorIs(t, TryProjectQuota(mountTmpfs(t, 0)), errdefs.ErrNotImplemented)
	require.ErrorIs(t, TryProjectQuota(mountLoop(t, "rw", "mkfs.ext4", "-q", "-F")), errdefs.ErrNotImplemented)
}
