// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// small is a tmpfs of one MiB with few inodes.
func small(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,nr_inodes=100"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "fill"))
	require.NoError(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	require.ErrorIs(t, err, unix.ENOSPC)
}

func takeInodes(t *testing.T, dir string) {
	t.Helper()
	var err error
	for i := 0; err == nil; i++ {
		err = os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755)
	}
	require.True(t, errors.Is(err, unix.ENOSPC), err)
}

// A full tier is called full: nothing is said of overlayfs, of the kernel or of errors of the device.
func TestFullTiersAreCalledFull(t *testing.T) {
	for name, x := range map[string]struct {
		use  func(*testing.T, string)
		hdd  string
		nvm  string
		last string
	}{
		"bytes":  {fill, "the filesystem at %s is full: no pull succeeds", "0 B are free and", "%s is full"},
		"inodes": {takeInodes, "no inode of 100 is free on %s: no pull succeeds", "no inode of 100 is free on %s: new files go to HDD", "no inode is free on %s"},
	} {
		t.Run(name, func(t *testing.T) {
			full := small(t)
			x.use(t, full)
			at := func(s string) string { return strings.ReplaceAll(s, "%s", full) }
			quiet := func(all []Finding) {
				for _, f := range all {
					require.NotContains(t, f.Text, "overlayfs does not take")
					require.NotContains(t, f.Text, "no data-only layers")
					require.NotContains(t, f.Cure, "dmesg")
					require.NotContains(t, f.Cure, "ext4 or xfs (with ftype=1)")
					require.True(t, f.Level == OK || f.Cure != "", "%+v", f)
				}
			}

			all := Host(settings(full, tmpfs(t, 0)), true)
			has(t, all, Fail, "hdd", at(x.hdd))
			has(t, all, Warn, "hdd", "whether overlayfs takes the filesystem for its writable directories was not tried: "+at(x.last))
			has(t, all, OK, "kernel", "data-only layers")
			quiet(all)

			all = Host(settings(t.TempDir(), full), true)
			has(t, all, Warn, "nvm", at(x.nvm))
			has(t, all, Warn, "regions", "was not tried: "+at(x.last))
			has(t, all, Warn, "nvm", "project quotas were not tried: "+at(x.last))
			has(t, all, OK, "kernel", "data-only layers") // tried on the other tier
			for _, f := range all {
				require.NotEqual(t, Fail, f.Level, "%+v", f)
			}
			quiet(all)

			all = Host(settings(filepath.Join(full, "a"), filepath.Join(full, "b")), true)
			has(t, all, Warn, "kernel", "the kernel was not tried: "+at(x.last))
			quiet(all)
		})
	}
}

func TestLittleRoom(t *testing.T) {
	c := settings("/root", "/nvm")
	look := func(name string, d host.Dir) []Finding {
		f := &findings{area: name}
		room(f, name, d, c)
		return f.all
	}
	whole := host.Dir{Total: 1 << 30, Free: 1 << 29, Inodes: 1000, InodesFree: 500}
	require.Empty(t, look("nvm", whole))
	require.Empty(t, look("hdd", whole))
	require.Empty(t, look("hdd", host.Dir{Total: 1 << 30, Free: 1 << 29})) // no limit of inodes

	few := whole
	few.InodesFree = 49
	has(t, look("nvm", few), Warn, "nvm", "only 49 of 1000 inodes are free: new files soon go to HDD")
	has(t, look("hdd", few), Warn, "hdd", "only 49 of 1000 inodes are free")
	little := whole
	little.Free = 1 << 20
	has(t, look("hdd", little), Warn, "hdd", "only 1.05 MB of 1.07 GB are free")
	has(t, look("nvm", little), Warn, "nvm", "are to stay free: new files go to HDD")
}
