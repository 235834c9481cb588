// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
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
			_, err := Open(c.hdd, c.nvm, p("state"))
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err), err)
		})
	}
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

func TestSwingBeforeStoring(t *testing.T) {
	s := open(t)
	prepare(t, s, "7", placement.HDD)
	require.NoError(t, s.Link("7", placement.HDD))
	for _, to := range []placement.Tier{placement.NVM, placement.HDD, placement.NVM, placement.NVM} {
		require.NoError(t, s.Swing("7", to))
		on, err := s.StagedOn("7")
		require.NoError(t, err)
		require.Equal(t, to, on)
		for _, tr := range Tiers {
			require.Equal(t, tr == to, isDir(s.Staging(tr, "7")), "staging directory on %s", tr)
		}
	}
	write(t, filepath.Join(s.Linked("7"), "f"), "x")
	require.ErrorIs(t, s.Swing("7", placement.HDD), ErrStoring)
	on, err := s.Commit("7")
	require.NoError(t, err)
	require.Equal(t, placement.NVM, on)
	require.FileExists(t, filepath.Join(s.Data(placement.NVM, "7"), "f"))
	again, err := s.Commit("7")
	require.NoError(t, err)
	require.Equal(t, on, again)
	require.NoError(t, s.Unstage("7"))
	require.NoError(t, s.Remove("7"))
	ids, err := s.IDs()
	require.NoError(t, err)
	require.Empty(t, ids)
}

func TestSwingOfNothing(t *testing.T) {
	s := open(t)
	require.True(t, errdefs.IsNotFound(s.Swing("7", placement.NVM)))
	_, err := s.Commit("7")
	require.True(t, errdefs.IsNotFound(err))
}

// A writer that begins at any moment of a swing must find its file whole on one
// tier, be told by an error of its own, or have the commit refused.
func TestSwingAgainstAWriter(t *testing.T) {
	s := open(t)
	var onOne, refused, failed int
	for i := range 600 {
		id := "7"
		prepare(t, s, id, placement.HDD)
		require.NoError(t, s.Link(id, placement.HDD))
		var wrote atomic.Int32
		var failedWrite atomic.Bool
		var wg sync.WaitGroup
		start := make(chan struct{})
		wg.Go(func() {
			<-start
			for j := range 4 {
				err := os.Mkdir(filepath.Join(s.Linked(id), string(rune('a'+j))), 0o755)
				if err != nil {
					failedWrite.Store(true)
					return
				}
				wrote.Add(1)
			}
		})
		wg.Go(func() {
			<-start
			for range i % 50 {
				_ = i // a moment that differs from round to round
			}
			if err := s.Swing(id, placement.NVM); err != nil && !errors.Is(err, ErrStoring) {
				t.Errorf("swing: %v", err)
			}
		})
		close(start)
		wg.Wait()
		on, err := s.Commit(id)
		switch {
		case failedWrite.Load():
			failed++ // containerd's applier fails, and with it the pull
		case err != nil:
			require.True(t, errdefs.IsAborted(err), err)
			refused++
		default:
			onOne++
			names, err := readNames(s.Data(on, id))
			require.NoError(t, err)
			require.Len(t, names, int(wrote.Load()), "a layer lost what was written")
		}
		require.NoError(t, s.Remove(id))
	}
	t.Logf("%d whole, %d refused at commit, %d writers failed", onOne, refused, failed)
	require.Positive(t, onOne)
}

func TestCommitRefusesATornLayer(t *testing.T) {
	s := open(t)
	prepare(t, s, "7", placement.HDD)
	require.NoError(t, s.Link("7", placement.HDD))
	require.NoError(t, os.MkdirAll(filepath.Join(s.Staging(placement.NVM, "7"), "fs"), 0o755))
	_, err := s.Commit("7")
	require.True(t, errdefs.IsAborted(err), err)
	require.ErrorContains(t, err, "pull the image again")
}

func TestUncommit(t *testing.T) {
	s := open(t)
	prepare(t, s, "7", placement.NVM)
	write(t, filepath.Join(s.Staging(placement.NVM, "7"), "fs", "f"), "x")
	on, err := s.Commit("7")
	require.NoError(t, err)
	require.NoError(t, s.Uncommit("7", on))
	require.FileExists(t, filepath.Join(s.Staging(placement.NVM, "7"), "fs", "f"))
}

func TestWriteBack(t *testing.T) {
	s := open(t)
	from := s.Data(placement.NVM, "7")
	require.NoError(t, os.MkdirAll(filepath.Join(from, "sub"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(from, "sub"), 0o750|os.ModeSticky))
	big := strings.Repeat("0123456789abcdef", 200_000)
	write(t, filepath.Join(from, "sub", "big"), big)
	write(t, filepath.Join(from, "empty"), "")
	require.NoError(t, os.Link(filepath.Join(from, "sub", "big"), filepath.Join(from, "other")))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(from, "link")))
	sparse, err := os.Create(filepath.Join(from, "sparse"))
	require.NoError(t, err)
	_, err = sparse.WriteAt([]byte("end"), 64<<20)
	require.NoError(t, err)
	require.NoError(t, sparse.Truncate(100<<20))
	require.NoError(t, sparse.Close())

	paced := 0
	n, err := s.WriteBack(t.Context(), "7", func(n int) error {
		require.LessOrEqual(t, n, writeBackChunk)
		paced += n
		return nil
	})
	require.NoError(t, err)
	require.EqualValues(t, paced, n)
	require.Less(t, n, int64(8<<20), "holes were copied")

	to := s.Data(placement.HDD, "7")
	b, err := os.ReadFile(filepath.Join(to, "sub", "big"))
	require.NoError(t, err)
	require.Equal(t, big, string(b))
	a, _ := os.Stat(filepath.Join(to, "sub", "big"))
	c, err := os.Stat(filepath.Join(to, "other"))
	require.NoError(t, err)
	require.True(t, os.SameFile(a, c), "hard links were torn apart")
	st, err := os.Stat(filepath.Join(to, "sub"))
	require.NoError(t, err)
	require.Equal(t, 0o750|os.ModeSticky|os.ModeDir, st.Mode())
	require.NoFileExists(t, filepath.Join(to, "empty"), "metadata do not belong there")
	_, err = os.Lstat(filepath.Join(to, "link"))
	require.ErrorIs(t, err, os.ErrNotExist)
	st, err = os.Stat(filepath.Join(to, "sparse"))
	require.NoError(t, err)
	require.EqualValues(t, 100<<20, st.Size())

	n, err = s.WriteBack(t.Context(), "7", func(int) error { return nil })
	require.NoError(t, err)
	require.Zero(t, n, "what is there was copied again")
}

func TestWriteBackResumes(t *testing.T) {
	s := open(t)
	from := s.Data(placement.NVM, "7")
	require.NoError(t, os.MkdirAll(from, 0o755))
	for _, name := range []string{"a", "b", "c"} {
		write(t, filepath.Join(from, name), strings.Repeat(name, 3*writeBackChunk))
	}
	// The first try ends in the middle of b, which must not be found under its name.
	ctx, cancel := context.WithCancel(t.Context())
	pieces := 0
	_, err := s.WriteBack(ctx, "7", func(int) error {
		if pieces++; pieces == 5 {
			cancel()
			return ctx.Err()
		}
		return nil
	})
	require.ErrorIs(t, err, context.Canceled)
	require.FileExists(t, filepath.Join(s.Data(placement.HDD, "7"), "a"))
	require.NoFileExists(t, filepath.Join(s.Data(placement.HDD, "7"), "b"))
	n, err := s.WriteBack(t.Context(), "7", func(int) error { return nil })
	require.NoError(t, err)
	require.EqualValues(t, 6*writeBackChunk, n)
	for _, name := range []string{"a", "b", "c"} {
		b, err := os.ReadFile(filepath.Join(s.Data(placement.HDD, "7"), name))
		require.NoError(t, err)
		require.Equal(t, strings.Repeat(name, 3*writeBackChunk), string(b))
	}
	ids, err := s.IDs()
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"7": true}, ids, "a temporary file is left")
}

// What was not cached is not cached afterwards, and what was still is.
func TestWriteBackLeavesTheCacheAlone(t *testing.T) {
	s := open(t)
	from := s.Data(placement.NVM, "7")
	require.NoError(t, os.MkdirAll(from, 0o755))
	cached := func(name string, drop bool) uint64 {
		f, err := os.Open(filepath.Join(from, name))
		require.NoError(t, err)
		defer f.Close()
		if drop {
			require.NoError(t, f.Sync())
			require.NoError(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		}
		var st unix.Cachestat_t
		require.NoError(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))
		return st.Cache
	}
	for _, name := range []string{"cold", "warm"} {
		write(t, filepath.Join(from, name), strings.Repeat(name, 3*writeBackChunk))
	}
	if cached("cold", true) > 0 {
		t.Skip("this filesystem keeps all its files cached")
	}
	warm := cached("warm", false)
	require.Positive(t, warm)
	f, err := os.Open(filepath.Join(from, "cold"))
	require.NoError(t, err)
	defer f.Close()
	if _, err := unix.Preadv2(int(f.Fd()), [][]byte{make([]byte, 1)}, 0, unix.RWF_DONTCACHE); err != nil {
		t.Skip("the kernel cannot read without caching: ", err)
	}
	_, err = s.WriteBack(t.Context(), "7", func(int) error { return nil })
	require.NoError(t, err)
	require.LessOrEqual(t, cached("cold", false), uint64(4))
	require.Equal(t, warm, cached("warm", false))
	b, err := os.ReadFile(filepath.Join(s.Data(placement.HDD, "7"), "cold"))
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("cold", 3*writeBackChunk), string(b))
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
	ids, err := s.IDs()
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"7": true}, ids)
	names, err = readNames(filepath.Join(s.Root(placement.NVM), "s"))
	require.NoError(t, err)
	require.Empty(t, names)
}
