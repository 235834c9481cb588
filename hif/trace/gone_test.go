// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// A mount that comes and goes before it can be looked at: its opens are given
// to the start that has the layer, and marked.
func TestMomentaryMount(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "etc/passwd", []byte("root:x:0:0::/:/bin/sh\n"))
	s.put(placement.HDD, "9", "etc/foreign", []byte("x"))
	tr := s.tracer(s.config())
	c := s.container("7")
	c.Layers = []string{"3"}
	w := watch(t, tr, c)
	point := t.TempDir()
	release := hold(t, tr) // the reader is busy elsewhere
	mountOverlay(t, point, c.lower())
	run(t, "cat", filepath.Join(point, "etc/passwd"))
	require.NoError(t, unix.Unmount(point, 0))
	mountOverlay(t, point, c.lower())
	run(t, "cat", filepath.Join(point, "etc/foreign"))
	require.NoError(t, unix.Unmount(point, 0))
	release()
	got := ready(w)
	require.Equal(t, []string{"etc/passwd"}, s.paths(got))
	require.True(t, got.Files[0].Assumed)
	require.EqualValues(t, 1, tr.Stats().Unresolved)

	// While it stands, such a mount is known by its tree.
	w = watch(t, tr, c)
	mountOverlay(t, point, c.lower())
	run(t, "cat", filepath.Join(point, "etc/passwd"))
	require.Eventually(t, func() bool { return tr.Stats().Opens[placement.HDD] == 2 }, 10*time.Second, time.Millisecond)
	require.NoError(t, unix.Unmount(point, 0))
	got = ready(w)
	require.Equal(t, []string{"etc/passwd"}, s.paths(got))
	require.False(t, got.Files[0].Assumed)
}

// containerd's mount for a moment goes when containerd is done with it, also
// while it is being looked at: what finds it busy waits 50 ms.
func TestMomentaryMountIsNotHeld(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "etc/passwd", []byte("root"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	looked := make(chan error, 10)
	release := hold(t, tr)
	tr.probing = func(o *overlay) { looked <- unix.Unmount(o.point, 0) }
	run(t, "cat", c.mount()+"/etc/passwd")
	release()
	select {
	case err := <-looked:
		require.NoError(t, err)
	case <-time.After(10 * time.Second):
		t.Fatal("nobody looked")
	}
	got := ready(w)
	require.Equal(t, []string{"etc/passwd"}, s.paths(got))
	require.False(t, got.Files[0].Assumed, "it was found out whose it was")
}

// A container that was gone before it could be looked at leaves its opens to the watch that saw no other, and not to a
// container that is known to run.
func TestContainerThatWasGone(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/sh", "/bin/cat")
	s.put(placement.NVM, "3", "fast", []byte("x"))
	for _, f := range []string{"lives", "gone", "late", "passwd"} {
		s.put(placement.HDD, "3", f, []byte("x"))
	}
	tr := s.tracer(s.config())
	lives, gone := s.container("7"), s.container("8")
	lives.Layers, gone.Layers = []string{"3"}, []string{"3"}
	a, b := watch(t, tr, lives), watch(t, tr, gone)
	run(t, "chroot", lives.mount(), "/bin/sh", "-c", "cat /lives")
	require.Eventually(t, func() bool { return a.Files() > 0 && tr.Stats().Opens[placement.HDD] >= 1 }, 10*time.Second, time.Millisecond)
	release := hold(t, tr)
	m := gone.mount()
	run(t, "chroot", m, "/bin/sh", "-c", "cat /gone /fast")
	require.NoError(t, unix.Unmount(m, 0))
	point := t.TempDir() // somebody only looks
	mountOverlay(t, point, lives.lower())
	run(t, "cat", filepath.Join(point, "passwd"))
	require.NoError(t, unix.Unmount(point, 0))
	release()
	first, second := ready(a), ready(b)
	require.Contains(t, s.paths(first), "lives")
	require.Contains(t, s.paths(first), "passwd")
	require.NotContains(t, s.paths(first), "gone")
	require.Contains(t, s.paths(second), "gone")
	require.Contains(t, s.paths(second), "fast")
	require.NotContains(t, s.paths(second), "lives")
}

// Containers of two images were gone before anybody could look at them. A mount through which a file of one image's own layer
// was opened is of that image, and so is the rest that was opened through it, also of layers that both have; and a start that
// has executed through such a mount leaves those of others alone. The two may stand on different tiers, and so come through
// different mounts, of which only the process tells that they are of one container.
func TestMountsAreOfTheImageWhoseLayersTheyHave(t *testing.T) {
	for _, own := range []placement.Tier{placement.NVM, placement.HDD} {
		t.Run(own.String(), func(t *testing.T) { mountsAreOfTheImage(t, own) })
	}
}

func mountsAreOfTheImage(t *testing.T, own placement.Tier) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/sh", "/bin/cat")
	for _, f := range []string{"of-a", "of-b", "of-again"} {
		s.put(placement.NVM, "3", f, []byte("x"))
	}
	s.put(own, "4", "own-a", []byte("x"))
	s.put(own, "5", "own-b", []byte("x"))
	tr := s.tracer(s.config())
	a, b, again := s.container("7"), s.container("8"), s.container("9")
	a.Layers, b.Layers, again.Layers = []string{"3", "4"}, []string{"3", "5"}, []string{"3", "4"}
	watches := []*Watch{watch(t, tr, a), watch(t, tr, b), watch(t, tr, again)}
	release := hold(t, tr)
	for script, c := range map[string]*container{"cat /own-a /of-a": a, "cat /own-b /of-b": b, "cat /of-again": again} {
		m := c.mount()
		run(t, "chroot", m, "/bin/sh", "-c", script)
		require.NoError(t, unix.Unmount(m, 0))
	}
	release()
	first, second := s.paths(ready(watches[0])), s.paths(ready(watches[1]))
	require.Contains(t, first, "own-a")
	require.Contains(t, first, "of-a")
	require.NotContains(t, first, "own-b")
	require.NotContains(t, first, "of-b")
	require.Contains(t, second, "own-b")
	require.Contains(t, second, "of-b")
	require.NotContains(t, second, "own-a")
	require.NotContains(t, second, "of-a")
	require.NotContains(t, second, "of-again", "it is known which mount is its own")
	require.Contains(t, s.paths(ready(watches[2])), "of-again")
}

// Its start ends by quiet all the same.
func TestQuietAfterAContainerThatWasGone(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/cat")
	s.put(placement.HDD, "3", "f", []byte("x"))
	cfg := s.config()
	cfg.Quiet = time.Millisecond
	tr := s.tracer(cfg)
	c := s.container("7")
	c.Layers = []string{"3"}
	w := watch(t, tr, c)
	release := hold(t, tr)
	m := c.mount()
	run(t, "chroot", m, "/bin/cat", "f")
	require.NoError(t, unix.Unmount(m, 0))
	release()
	select {
	case <-w.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it waits for a first open")
	}
	got := w.Result()
	require.Equal(t, EndQuiet, got.Ended)
	require.Contains(t, s.paths(got), "f")
	require.True(t, got.Executed())
}

// The mount of a container is known on one tier when it goes, and not yet on the other: one process has used both.
func TestHalfOfAMountIsKnown(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/sh", "/bin/cat")
	s.put(placement.HDD, "3", "late", []byte("x"))
	tr := s.tracer(s.config())
	c, other := s.container("7"), s.container("8")
	c.Layers, other.Layers = []string{"3"}, []string{"3"}
	a, b := watch(t, tr, c), watch(t, tr, other)
	m := c.mount()
	read, write, err := os.Pipe()
	require.NoError(t, err)
	cmd := exec.Command("chroot", m, "/bin/sh", "-c", "read x; exec cat /late")
	cmd.Stdin = read
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return a.Files() > 0 }, 10*time.Second, time.Millisecond)
	release := hold(t, tr)
	_, err = write.WriteString("go\n")
	require.NoError(t, err)
	require.NoError(t, errors.Join(cmd.Wait(), read.Close(), write.Close()))
	require.NoError(t, unix.Unmount(m, 0))
	release()
	first := ready(a)
	require.Contains(t, s.paths(first), "late")
	require.NotContains(t, s.paths(ready(b)), "late")
}
