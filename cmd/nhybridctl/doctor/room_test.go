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

	"github.com/nhybrid/nhybrid/cmd/internal/config"
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
		"bytes":  {fill, "HDD is full: no pull succeeds", "NVM is full: 0 B free, the reserve is", "%s is full"},
		"inodes": {takeInodes, "HDD has no inode free of 100: no pull succeeds", "NVM has too few inodes: 0 of 100 free, the reserve is ", "no inode is free on %s"},
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
	whole := host.Dir{Total: 1e9, Free: 5e8, Inodes: 100_000, InodesFree: 50_000}
	require.Empty(t, look("nvm", whole))
	require.Empty(t, look("hdd", whole))
	require.Empty(t, look("nvm", host.Dir{Total: 1 << 30, Free: 1 << 29})) // no limit of inodes

	few := whole
	few.InodesFree = 6000 // the reserve, and what a writable directory must be able to take
	has(t, look("nvm", few), Warn, "nvm", "NVM has too few inodes: 6000 of 100000 free, the reserve is 5000, so that layers and writable directories go to HDD")
	require.Empty(t, look("hdd", few))
	few.InodesFree++
	require.Empty(t, look("nvm", few))
	c.Placement.NVMReserve = config.Space{Percent: 10}
	has(t, look("nvm", few), Warn, "nvm", "the reserve is 10000")
	few.InodesFree = 4999
	has(t, look("hdd", few), Warn, "hdd", "HDD has few inodes: 4999 of 100000 free")
	few.InodesFree = 0
	has(t, look("hdd", few), Fail, "hdd", "HDD has no inode free")
	little := whole
	little.Free = 1 << 20
	has(t, look("hdd", little), Warn, "hdd", "HDD is nearly full: 1.05 MB of 1.00 GB free")
	has(t, look("nvm", little), Warn, "nvm", "NVM is full: 1.05 MB free, the reserve is 100 MB, so that layers and writable directories go to HDD")
}
