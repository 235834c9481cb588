// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

func tmpfs(t *testing.T, flags uintptr) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", flags, "size=4m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func settings(root, nvm string) config.Config {
	c := config.Default()
	c.Root, c.NVMRoot = root, nvm
	return c
}

func has(t *testing.T, all []Finding, level Level, area, text string) {
	t.Helper()
	for _, f := range all {
		if f.Level == level && f.Area == area && strings.Contains(f.Text, text) {
			return
		}
	}
	require.Fail(t, "no such finding", "%s %s %q in %+v", level, area, text, all)
}

func TestHost(t *testing.T) {
	nvm, root := tmpfs(t, 0), t.TempDir()
	all := Host(settings(root, filepath.Join(nvm, "nhybrid")), true)
	for _, f := range all {
		require.NotEqual(t, Fail, f.Level, "%+v", f)
		require.NotContains(t, f.Text+f.Cure, "\n")
	}
	has(t, all, OK, "kernel", "data-only layers")
	has(t, all, OK, "tiers", "two filesystems")
	has(t, all, OK, "nvm", "is on tmpfs")
	has(t, all, Warn, "nvm", "max-size is ignored")
	for _, dir := range []string{nvm, root} {
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

func TestHostFindsFaults(t *testing.T) {
	one := tmpfs(t, 0)
	all := Host(settings(filepath.Join(one, "hdd"), filepath.Join(one, "nvm")), true)
	has(t, all, Warn, "tiers", "same filesystem")

	all = Host(settings(t.TempDir(), filepath.Join(one, "not", "there")), true)
	has(t, all, Fail, "nvm", "does not exist")
	has(t, all, OK, "kernel", "data-only layers") // tried on the other tier

	all = Host(settings(t.TempDir(), tmpfs(t, unix.MS_RDONLY)), true)
	has(t, all, Fail, "nvm", "is read-only")

	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	all = Host(settings(filepath.Join(file, "below"), filepath.Join(file, "too")), true)
	has(t, all, Fail, "hdd", "not a directory")
	has(t, all, Fail, "nvm", "not a directory")
	has(t, all, Warn, "kernel", "not tried")

	c := settings(t.TempDir(), one)
	c.Placement.NVMReserve = config.Space{Bytes: 1 << 40}
	has(t, Host(c, true), Warn, "nvm", "so that layers and writable directories go to HDD")
}

func TestReadAheadOfNVM(t *testing.T) {
	c := settings(t.TempDir(), t.TempDir())
	look := func(d host.Dir) []Finding {
		f := &findings{area: "nvm"}
		d.Total, d.Free = 1<<40, 1<<40
		nvm(f, d, c)
		return f.all
	}
	has(t, look(host.Dir{ReadAhead: 2560 << 10, Dev: unix.Mkdev(259, 3)}), Warn, "nvm", "2.62 MB ahead")
	has(t, look(host.Dir{ReadAhead: 128 << 10, Dev: unix.Mkdev(259, 3)}), OK, "nvm", "131 kB ahead")
	has(t, look(host.Dir{ReadAhead: 128 << 10, Dev: unix.Mkdev(259, 3)}), OK, "nvm", "echo 16 > /sys/class/bdi/259:3/read_ahead_kb")
	for _, d := range []host.Dir{{ReadAhead: 16 << 10}, {ReadAhead: -1}, {ReadAhead: 2560 << 10, DAX: host.Yes}} {
		for _, f := range look(d) {
			require.NotContains(t, f.Text, "ahead")
		}
	}
}

func TestFsync(t *testing.T) {
	dir := t.TempDir()
	took, err := Fsync(dir)
	require.NoError(t, err)
	require.Positive(t, took)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	_, err = Fsync(filepath.Join(dir, "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
