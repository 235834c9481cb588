// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// What is touched of a divided file is found in its own page cache, also when
// another image has taken the place of the one that the container has.
func TestTouchedParts(t *testing.T) {
	need(t, "mkfs.ext4", "mount", "dd")
	s := newStore(t)
	s.onDisk()
	const mb = 1 << 20
	s.put(placement.HDD, "3", "big", make([]byte, 8*mb+5))
	s.put(placement.HDD, "3", "small", make([]byte, 100))
	s.put(placement.NVM, "3", "fast", make([]byte, 2*mb))
	tr := s.tracer(s.config())
	c := s.container("7")
	c.Parts = s.divide("7", mb)
	w := watch(t, tr, c)
	m := c.mount()
	run(t, "cat", m+"/small", m+"/fast")
	run(t, "dd", "if="+m+"/big", "of=/dev/null", "bs=4k", "count=1", "skip=1024", "status=none")
	require.Equal(t, c.Parts, s.divide("7", 1)) // for later containers
	run(t, "dd", "if="+m+"/big", "of=/dev/null", "bs=4k", "count=1", "skip=1536", "status=none")
	// Opened by the mount of the parts itself: nobody's start.
	run(t, "cat", c.Parts+s.refs["small"].Redirect())
	got := ready(w)
	require.True(t, got.Complete)
	require.False(t, got.Executed(), "not in the container")
	by := s.byPath(got)
	require.Len(t, by, 3)
	require.True(t, by["big"].Parts)
	require.Equal(t, placement.NVM, by["big"].Tier)
	require.False(t, by["small"].Parts)
	require.Equal(t, placement.HDD, by["small"].Tier)
	require.False(t, by["fast"].Parts)
	require.EqualValues(t, 8*mb+5, by["big"].Size)
	require.GreaterOrEqual(t, by["big"].Touched, int64(2*4096))
	require.Len(t, by["big"].Ranges, 2)
	for i, at := range []int64{4 * mb, 6 * mb} {
		r := by["big"].Ranges[i]
		require.True(t, r.Offset <= at && at < r.end(), "%v at %d", r, at)
		require.LessOrEqual(t, r.Length, int64(512<<10), "read-ahead")
	}
	require.EqualValues(t, 2, tr.Stats().Parts)
	require.Empty(t, tr.images, "given back")
}

// Containers with parts, with other parts and without, all of the same files,
// started at once.
func TestPartsDoNotMix(t *testing.T) {
	need(t, "mkfs.ext4", "mount")
	s := newStore(t)
	s.onDisk()
	s.install(placement.HDD, "3", "/bin/sh", "/bin/cat")
	const n = 9
	for i := range n {
		s.put(placement.HDD, "4", fmt.Sprintf("app%d", i), []byte("x"))
		s.put(placement.HDD, "4", fmt.Sprintf("app%d.big", i), make([]byte, 1<<20))
	}
	points := []string{"", s.divide("a", 1), s.divide("b", 1<<20)}
	tr := s.tracer(s.config())
	var conts [n]*container
	var watches [n]*Watch
	for i := range n {
		conts[i] = s.container(fmt.Sprint(100 + i))
		conts[i].Parts = points[i%3]
		watches[i] = watch(t, tr, conts[i])
		conts[i].mount()
	}
	var wg sync.WaitGroup
	var errs [n]error
	for i := range n {
		wg.Go(func() {
			errs[i] = exec.Command("chroot", conts[i].point, "/bin/sh", "-c", fmt.Sprintf("cat /app%d /app%d.big /app%d", i, i, i)).Run()
		})
	}
	wg.Wait()
	for i := range n {
		require.NoError(t, errs[i])
		got := ready(watches[i])
		require.True(t, got.Complete)
		require.True(t, got.Executed())
		require.Len(t, got.Files, 6, "%v", s.paths(got))
		for _, f := range got.Files {
			require.False(t, f.Assumed)
			require.Equal(t, i%3 == 1 || i%3 == 2 && f.Size >= 1<<20, f.Parts, "%d: %s", i, s.names[f.Ref])
			if f.Layer == 4 {
				require.Contains(t, []string{fmt.Sprintf("app%d", i), fmt.Sprintf("app%d.big", i)}, s.names[f.Ref])
			}
		}
	}
	require.Zero(t, tr.Stats().Unresolved)
	require.Empty(t, tr.images)
}

func TestPartsThatAreNotMounted(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("x"))
	tr := s.tracer(s.config())
	for i, point := range []string{filepath.Join(t.TempDir(), "missing"), t.TempDir()} {
		c := s.container(fmt.Sprint(i))
		c.Parts = point
		w := watch(t, tr, c)
		c.Parts = ""
		run(t, "cat", c.mount()+"/f")
		got := ready(w)
		require.True(t, got.Complete)
		require.Len(t, got.Files, 1)
	}
}

// containerd asks for the mounts of a running container to see what it has changed.
func TestMountedIsNoStart(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("x"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	require.Same(t, w, watch(t, tr, c), "its own start is still being watched")
	run(t, "cat", m+"/f")
	require.Len(t, ready(w).Files, 1)
	_, err := tr.Watch(c.Start)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.Nil(t, tr.Find("7"))

	require.NoError(t, unix.Unmount(m, 0))
	w = watch(t, tr, c)
	run(t, "cat", c.mount()+"/f")
	require.Len(t, ready(w).Files, 1, "it starts again")

	// A view has no upper directory to be known by.
	view := Start{Snapshot: "8", Tree: s.tree(), Home: s.home(), Layers: []string{"3"}}
	_, err = tr.Watch(view)
	require.NoError(t, err)
}

func TestExecuted(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/cat")
	s.put(placement.HDD, "3", "etc/passwd", []byte("root:x:0:0::/:\n"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	_, err := os.Stat(m + "/bin/cat")
	require.NoError(t, err)
	run(t, "cat", m+"/etc/passwd", m+"/bin/cat")
	got := ready(w)
	require.Len(t, got.Files, 2)
	require.False(t, got.Executed(), "only read, by programs of the host")

	require.NoError(t, unix.Unmount(m, 0))
	w = watch(t, tr, c)
	run(t, "chroot", c.mount(), "/bin/cat", "/etc/passwd")
	got = ready(w)
	require.True(t, got.Executed())
}
