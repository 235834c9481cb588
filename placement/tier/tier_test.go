// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

func open(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(filepath.Join(dir, "hdd"), filepath.Join(dir, "nvm"), filepath.Join(dir, "state"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func prepare(t *testing.T, s *Store, id string, on placement.Tier) {
	t.Helper()
	name, err := s.Prestage(on, 0, 0)
	require.NoError(t, err)
	require.NoError(t, s.Stage(id, on, name))
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	p := func(s string) string { return filepath.Join(dir, s) }
	require.NoError(t, os.MkdirAll(p("linked"), 0o755))
	require.NoError(t, os.Symlink("/", p("linked/d")))
	a, err := Open(p("a-hdd"), p("a-nvm"), p("state"))
	require.NoError(t, err)
	require.NoError(t, a.Close())
	b, err := Open(p("b-hdd"), p("b-nvm"), p("state"))
	require.NoError(t, err)
	require.NoError(t, b.Close())

	for name, c := range map[string]struct{ hdd, nvm, says string }{
		"relative":              {"x", p("n"), "not an absolute path"},
		"inside":                {p("a"), p("a/n"), "contain each other"},
		"the same":              {p("a"), p("a"), "contain each other"},
		"colon":                 {p("a:b"), p("n"), "colon"},
		"comma":                 {p("h"), p("n,m"), "comma"},
		"NVM not mounted":       {p("h"), p("missing/nvm"), "mount the NVM filesystem"},
		"data root a symlink":   {p("h2"), p("linked"), "not a directory"},
		"of another store":      {p("a-hdd"), p("b-nvm"), "belongs to store"},
		"HDD root is not there": {p("new"), p("b-nvm"), "but HDD root"},
	} {
		t.Run(name, func(t *testing.T) {
			before := listing(t, dir)
			_, err := Open(c.hdd, c.nvm, p("state"))
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err), err)
			if name != "data root a symlink" { // that is found when it is to be made
				require.Equal(t, before, listing(t, dir), "nothing is made")
			}
		})
	}
}

func listing(t *testing.T, dir string) (all []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		all = append(all, path)
		return err
	}))
	return all
}

func TestOpenAdoptsANewNVM(t *testing.T) {
	dir := t.TempDir()
	hdd, nvm, state := filepath.Join(dir, "hdd"), filepath.Join(dir, "nvm"), filepath.Join(dir, "state")
	s, err := Open(hdd, nvm, state)
	require.NoError(t, err)
	require.Empty(t, s.Former())
	require.NoError(t, s.Close())
	id := s.ID()

	s, err = Open(hdd, nvm, state)
	require.NoError(t, err)
	require.Empty(t, s.Former())
	require.NoError(t, s.Close())

	// A new root where a device that is not mounted would leave one is not believed.
	old := nvm + ".old"
	require.NoError(t, os.Rename(nvm, old))
	_, err = Open(hdd, nvm, state)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "not mounted")
	require.NoDirExists(t, nvm, "nothing is made where a device is to be mounted")
	require.NoError(t, os.Mkdir(nvm, 0o700))
	_, err = Open(hdd, nvm, state)
	require.ErrorContains(t, err, "not mounted")
	names, err := readNames(nvm)
	require.NoError(t, err)
	require.Empty(t, names)
	require.NoError(t, os.WriteFile(filepath.Join(nvm, adoptFile), nil, 0o600))
	s, err = Open(hdd, nvm, state)
	require.NoError(t, err)
	require.Equal(t, id, s.Former())
	require.NotEqual(t, id, s.ID())
	require.NoError(t, s.Close())

	// The lost one comes back, with what it remembers.
	require.NoError(t, os.RemoveAll(nvm))
	require.NoError(t, os.Rename(old, nvm))
	_, err = Open(hdd, nvm, state)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
}

// An id whose transaction did not come to its end is given out again.
func TestStageOverALeftover(t *testing.T) {
	s := open(t)
	prepare(t, s, "7", placement.HDD)
	write(t, filepath.Join(s.Staging(placement.HDD, "7"), "fs", "old"), "x")
	prepare(t, s, "7", placement.HDD)
	names, err := readNames(filepath.Join(s.Staging(placement.HDD, "7"), "fs"))
	require.NoError(t, err)
	require.Empty(t, names)
	_, err = s.Prestage(placement.NVM, 0, 0) // and never used
	require.NoError(t, err)
	ids, err := s.Staged()
	require.NoError(t, err)
	require.Equal(t, []string{"7"}, ids)
	names, err = readNames(filepath.Join(s.Root(placement.NVM), "s"))
	require.NoError(t, err)
	require.Empty(t, names)
}

// What is written uncached is all there, whatever pieces it comes in, and an error
// of the device is told.
func TestUncached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	require.NoError(t, err)
	u := NewUncached(f, 10000)
	var want []byte
	for i, n := range []int{1, 4095, 0, 9000, 70000, 3} {
		piece := bytes.Repeat([]byte{byte('a' + i)}, n)
		written, err := u.Write(piece)
		require.NoError(t, err)
		require.Equal(t, n, written)
		want = append(want, piece...)
	}
	require.NoError(t, u.Close())
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))

	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	defer full.Close()
	_, err = NewUncached(full, 0).Write([]byte("x"))
	require.ErrorIs(t, err, unix.ENOSPC)
}
