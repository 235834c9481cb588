// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/scmlib"
)

const (
	mib     = 1 << 20
	waitFor = 20 * time.Second
	tick    = 2 * time.Millisecond
)

// filesystem makes one of size bytes for the test, over memory where there is some.
func filesystem(t testing.TB, kind string, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts filesystems: needs root")
	}
	base, err := os.MkdirTemp("/dev/shm", "region-")
	if err != nil {
		base = t.TempDir()
	}
	t.Cleanup(func() {
		require.NoError(t, block.UnmountBelow(base))
		require.NoError(t, block.DetachBelow(base))
		require.NoError(t, os.RemoveAll(base))
	})
	dir := filepath.Join(base, "fs")
	if kind == "tmpfs" {
		require.NoError(t, block.Mount("regions", dir, "tmpfs", 0, "size="+strconv.FormatInt(size, 10)))
		return dir
	}
	img := filepath.Join(base, "img")
	f, err := os.Create(img)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
	l, err := block.Attach(img)
	require.NoError(t, err)
	defer l.Close()
	switch kind {
	case "ext4":
		require.NoError(t, block.MakeExt4(t.Context(), l.Path()))
	case "xfs":
		out, err := exec.CommandContext(t.Context(), "mkfs.xfs", "-q", "-f", l.Path()).CombinedOutput()
		if err != nil {
			if _, lookErr := exec.LookPath("mkfs.xfs"); lookErr != nil {
				t.Skip("needs xfsprogs")
			}
			t.Fatalf("mkfs.xfs: %v: %s", err, out)
		}
	}
	require.NoError(t, block.Mount(l.Path(), dir, kind, unix.MS_NOATIME, ""))
	return dir
}

// open opens a store, and closes it in the end.
func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(context.Background(), filepath.Join(dir, "r"), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func newStore(t testing.TB, o Options) *Store {
	t.Helper()
	return open(t, filesystem(t, "tmpfs", 256*mib), o)
}

// sleeper is a process in the place of a container.
func sleeper(t testing.TB) *exec.Cmd {
	t.Helper()
	c := exec.Command("sleep", "1000")
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	require.NoError(t, c.Start())
	t.Cleanup(func() { end(c) })
	return c
}

func end(c *exec.Cmd) {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// put formats a region and writes n as its root.
func put(t testing.TB, path string, n uint64) {
	t.Helper()
	st, err := os.Stat(path)
	require.NoError(t, err)
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: st.Size()})
	require.NoError(t, err)
	root, err := scmlib.Root[uint64](r)
	require.NoError(t, err)
	p := root.In(r)
	require.NoError(t, r.Update(func(tx *scmlib.Tx) error { err := tx.Add(p); *p = n; return err }))
	require.NoError(t, r.Close())
}

func get(t testing.TB, path string) (uint64, scmlib.Info) {
	t.Helper()
	r, err := scmlib.Open(path, scmlib.Options{ReadOnly: true})
	require.NoError(t, err)
	root, err := scmlib.Root[uint64](r)
	require.NoError(t, err)
	n, i := *root.In(r), r.Info()
	require.NoError(t, r.Close())
	return n, i
}

// blocks is how many bytes of a file have blocks.
func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

// everywhere runs a test on each filesystem.
func everywhere(t *testing.T, fn func(t *testing.T, dir string)) {
	for _, kind := range []string{"tmpfs", "ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			fn(t, filesystem(t, kind, 384*mib))
		})
	}
}
