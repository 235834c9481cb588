// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What the loss of power can leave: names that were not yet on the medium, though what they name was.
func TestAfterPowerLoss(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	s, err := Open(ctx, filepath.Join(dir, "r"), Options{Pool: map[int64]int{mib: 4}})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return s.Pooled(mib) == 4 }, waitFor, tick)
	take := func(name string, n uint64, age time.Duration) string {
		p := s.takePooled(mib)
		require.NoError(t, claim(p, Record{Ref: vol(name), ID: randomID(), Size: mib, Created: time.Now().Add(-age)}))
		put(t, filepath.Join(p, "data"), n)
		return p
	}
	take("a", 1, 0)
	take("b", 2, time.Hour) // it was removed, and another of its name came, before the crash
	take("b", 3, 0)
	torn := take("c", 4, 0)
	b, err := os.ReadFile(filepath.Join(torn, "meta"))
	require.NoError(t, err)
	copy(b[20:], "                                        ")
	require.NoError(t, os.WriteFile(filepath.Join(torn, "meta"), b, 0o600))
	// One that was made in tmp and renamed: its content did not reach the medium, and nobody was told of it.
	unwritten := s.dir(vol("d"))
	require.NoError(t, os.Mkdir(unwritten, 0o700))
	require.NoError(t, errors.Join(os.WriteFile(filepath.Join(unwritten, unsure), nil, 0o600), os.WriteFile(filepath.Join(unwritten, "meta"), nil, 0o600)))
	require.NoError(t, s.Close())

	s = open(t, dir, Options{})
	require.Empty(t, s.Problems())
	require.Len(t, s.List(""), 2)
	for name, want := range map[string]uint64{"a": 1, "b": 3} {
		n, _ := get(t, s.data(vol(name)))
		require.Equal(t, want, n)
	}
	for _, d := range []string{"pool", "tmp"} {
		left, err := os.ReadDir(filepath.Join(s.root, d))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// An earlier version wrote the content of copies into the pool. What it has left there is not taken for zeros.
func TestPoolOfEarlierVersion(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	o := Options{Pool: map[int64]int{mib: 2}}
	s, err := Open(ctx, filepath.Join(dir, "r"), o)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return s.Pooled(mib) == 2 }, waitFor, tick)
	require.NoError(t, s.Close())
	files, err := filepath.Glob(filepath.Join(s.root, "pool", "*", "data"))
	require.NoError(t, err)
	require.Len(t, files, 2)
	f, err := os.OpenFile(files[0], os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("secret"), 5000)
	require.NoError(t, errors.Join(err, f.Close()))
	later := time.Now().Add(time.Second) // the kernel's own times may be those of one tick of its clock
	require.NoError(t, os.Chtimes(files[0], later, later))
	kept := inode(t, files[1])

	s = open(t, dir, o)
	_, err = os.Stat(files[0])
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Equal(t, kept, inode(t, files[1]))
	require.Eventually(t, func() bool { return s.Pooled(mib) == 2 }, waitFor, tick)
}
