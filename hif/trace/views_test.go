// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// erofs makes an image of the view and mounts it in place of the directory.
func (s *store) erofs() {
	s.t.Helper()
	need(s.t, "mkfs.erofs", "mount")
	image := filepath.Join(s.t.TempDir(), "view.erofs")
	run(s.t, "mkfs.erofs", "--quiet", image, s.view)
	require.NoError(s.t, unix.Unmount(s.view, unix.MNT_DETACH))
	run(s.t, "mount", "-t", "erofs", "-o", "loop", image, s.view)
	s.t.Cleanup(func() { _ = unix.Unmount(s.view, unix.MNT_DETACH) })
}

// Tree and home are two directories of one EROFS mount, and the view may go
// while its containers run and their starts are watched.
func TestView(t *testing.T) {
	s := newStore(t)
	s.install(placement.HDD, "3", "/bin/sh")
	s.install(placement.NVM, "4", "/bin/cat")
	s.put(placement.HDD, "5", "a", []byte("a"))
	s.put(placement.HDD, "5", "b", []byte("b"))
	s.write(filepath.Join(s.tree(), "empty"), nil)
	s.erofs()
	tr := s.tracer(s.config())
	c, d := s.container("7"), s.container("8")
	v, w := watch(t, tr, c), watch(t, tr, d)
	script := []string{"/bin/sh", "-c", "read x < /empty; cat /a"}
	run(t, "chroot", append([]string{c.mount()}, script...)...)
	d.mount()
	run(t, "cat", s.at(placement.HDD, "b")) // by the view itself: of no container
	require.Eventually(t, func() bool { return v.Files() > 0 }, 10*time.Second, time.Millisecond)
	// Events come with descriptors of the view, until they have been looked at.
	require.Eventually(t, func() bool { return unix.Unmount(s.view, 0) == nil }, 10*time.Second, time.Millisecond, "the tracer does not keep it busy")
	run(t, "chroot", append([]string{d.point}, script...)...)
	for _, got := range []Trace{ready(v), ready(w)} {
		require.True(t, got.Complete)
		require.True(t, got.Executed())
		by := s.byPath(got)
		require.Equal(t, placement.HDD, by["bin/sh"].Tier)
		require.Equal(t, placement.NVM, by["bin/cat"].Tier)
		require.Contains(t, by, "a")
		require.NotContains(t, by, "b")
		require.NotContains(t, by, "empty")
	}
	require.Zero(t, tr.Stats().Unresolved)
	require.Empty(t, tr.images, "given back")
}

// The inodes of a view have page caches of their own: right after a pull, when
// all of the pack is cached, the first start tells what it touches.
func TestTouchedOfAWarmPack(t *testing.T) {
	need(t, "mkfs.ext4", "mount", "dd")
	s := newStore(t)
	s.onDisk()
	const mb = 1 << 20
	s.put(placement.HDD, "3", "big", make([]byte, 8*mb+5))
	s.put(placement.HDD, "3", "all", make([]byte, mb))
	p := s.pack()
	var files []parts.File
	for _, path := range []string{"big", "all"} { // as in a view, all bytes are in the pack
		ref := s.refs[path]
		files = append(files, parts.File{Redirect: ref.Redirect(), Size: p.sizes[ref]})
	}
	c := s.container("7")
	c.Home = s.mountParts("home", p, parts.Set{Files: files, Margin: 64 << 10})
	run(t, "cat", p.PackPath(3))
	f, err := os.Open(p.PackPath(3))
	require.NoError(t, err)
	defer f.Close()
	in, _, err := cached(int(f.Fd()), 0, 0)
	require.NoError(t, err)
	require.GreaterOrEqual(t, in, int64(9*mb), "the pack is cached")
	tr := s.tracer(s.config())
	for i := range 2 {
		w := watch(t, tr, c)
		m := c.mount()
		run(t, "dd", "if="+m+"/big", "of=/dev/null", "bs=4k", "count=1", "skip=1024", "status=none")
		run(t, "cat", m+"/all")
		by := s.byPath(ready(w))
		require.Len(t, by["big"].Ranges, 1, "start %d", i)
		r := by["big"].Ranges[0]
		require.True(t, r.Offset <= 4*mb && 4*mb < r.end() && r.Length <= 128<<10, "%v", r)
		require.Equal(t, placement.HDD, by["big"].Tier)
		require.False(t, by["big"].Parts)
		if i > 0 {
			require.EqualValues(t, -1, by["all"].Touched, "the first start has read it")
		}
		require.NoError(t, unix.Unmount(m, 0))
	}
}

// Where the files of an image are may become known only after its containers
// have opened some.
func TestPathsThatAreKnownLate(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/cat")
	s.put(placement.HDD, "3", "f", []byte("x"))
	tr := s.tracer(s.config())
	var known atomic.Bool
	late := func(c *container) *container {
		c.Path = func(ref pack.Ref) string {
			if !known.Load() {
				return ""
			}
			return s.path(ref)
		}
		return c
	}
	c, other := late(s.container("7")), late(s.container("8"))
	w, b := watch(t, tr, c), watch(t, tr, other)
	run(t, "chroot", c.mount(), "/bin/cat", "/f")
	other.mount()
	require.Eventually(t, func() bool { return tr.Stats().Opens == [2]uint64{1, 3} }, 10*time.Second, time.Millisecond)
	tr.Retry()
	require.Zero(t, w.Files(), "nothing is known")
	known.Store(true)
	tr.Retry()
	require.Equal(t, 4, w.Files())
	require.Zero(t, b.Files())
	got := ready(w)
	require.Contains(t, s.byPath(got), "f", "not assumed")
	require.True(t, got.Executed())
	require.Empty(t, ready(b).Files)
}

func TestStartsThatCannotBeWatched(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "f", []byte("x"))
	tr := s.tracer(s.config())
	for i, tc := range []struct {
		change func(*Start)
		want   error
	}{
		{func(s *Start) { s.Home = "" }, errdefs.ErrInvalidArgument},
		{func(s *Start) { s.Home = filepath.Join(s.Home, "missing") }, os.ErrNotExist},
		{func(s *Start) { s.Home = s.Upper }, errdefs.ErrInvalidArgument}, // on NVM
		{func(s *Start) { s.Layers = []string{"3", "sha256:4"} }, errdefs.ErrInvalidArgument},
	} {
		c := s.container(fmt.Sprint(i))
		tc.change(&c.Start)
		_, err := tr.Watch(c.Start)
		require.ErrorIs(t, err, tc.want)
	}
	require.Empty(t, tr.images)
	require.Zero(t, tr.Stats().Open)
}
