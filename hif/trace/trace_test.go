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
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

func TestStart(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/cat")
	s.put(placement.HDD, "4", "etc/motd", []byte("hello\n"))
	s.put(placement.HDD, "4", "etc/other", []byte("not opened\n"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	require.Same(t, w, watch(t, tr, c), "one watch a snapshot")
	require.Same(t, w, tr.Find("7"))

	m := c.mount()
	require.Equal(t, "hello\n", run(t, "chroot", m, "/bin/cat", "/etc/motd"))
	// stat is no use of the data, and writing a new file is none of a layer's.
	require.NoError(t, os.WriteFile(filepath.Join(m, "new"), []byte("x"), 0o644))
	_, err := os.Stat(filepath.Join(m, "etc/other"))
	require.NoError(t, err)
	// The daemon's own work and containerd's does not count.
	_, err = os.ReadFile(s.at(placement.HDD, "etc/other"))
	require.NoError(t, err)
	run(t, "cat", s.at(placement.HDD, "etc/other"))

	got := ready(w)
	require.Nil(t, tr.Find("7"))
	require.True(t, got.Complete)
	require.Equal(t, EndReady, got.Ended)
	byPath := s.byPath(got)
	require.Equal(t, Exec, byPath["bin/cat"].Kind)
	require.Equal(t, placement.NVM, byPath["bin/cat"].Tier)
	require.EqualValues(t, 3, byPath["bin/cat"].Layer)
	require.Equal(t, Exec, byPath["lib64/ld-linux-x86-64.so.2"].Kind, "%v", s.paths(got))
	require.Contains(t, byPath, "lib/x86_64-linux-gnu/libc.so.6")
	require.Equal(t, Read, byPath["etc/motd"].Kind)
	require.Equal(t, placement.HDD, byPath["etc/motd"].Tier)
	require.EqualValues(t, 6, byPath["etc/motd"].Size)
	require.Len(t, got.Files, 4, "%v", s.paths(got))
	require.Equal(t, "bin/cat", s.names[got.Files[0].Ref], "in order of first use")
	require.Equal(t, "etc/motd", s.names[got.Files[3].Ref])
	st := tr.Stats()
	require.Equal(t, [2]uint64{1, 3}, st.Opens)
	require.Zero(t, st.Open)
}

// Namespaces of all sorts: what tells the container is not the process.
func TestNamespaces(t *testing.T) {
	need(t, "unshare", "strace")
	for name, script := range map[string]string{
		"chroot": `exec chroot "$M" /bin/cat /motd`,
		"pivot":  `exec unshare -m --propagation private sh -c 'mount --rbind "$M" "$M" && cd "$M" && mkdir -p old && pivot_root . old && exec /bin/cat /motd'`,
		"bind":   `exec unshare -m --propagation private sh -c 'mount --rbind "$M" /mnt && exec chroot /mnt /bin/cat /motd'`,
		"host":   `exec cat "$M/motd"`,
		"pid":    `exec unshare -pfm --propagation private chroot "$M" /bin/cat /motd`,
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			s.install(placement.HDD, "3", "/bin/cat")
			s.put(placement.NVM, "3", "motd", []byte("x"))
			tr := s.tracer(s.config())
			c := s.container("7")
			w := watch(t, tr, c)
			cmd := exec.Command("sh", "-c", script)
			cmd.Env = append(os.Environ(), "M="+c.mount())
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			got := ready(w)
			require.Contains(t, s.paths(got), "motd")
			for _, f := range got.Files {
				require.False(t, f.Assumed)
			}
		})
	}
}

// An overlay that is mounted where the daemon cannot see it is found through
// the process that lives in it.
func TestHiddenMount(t *testing.T) {
	need(t, "unshare", "mount")
	s := newStoreAt(t, "view") // mount(8) has no way to say a comma
	s.install(placement.HDD, "3", "/bin/sh")
	s.put(placement.HDD, "3", "a", []byte("x\n"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	cmd := exec.Command("unshare", "-m", "--propagation", "private", os.Args[0], "-test.run=^TestHelperMount$")
	cmd.Env = append(os.Environ(), "HIF_POINT="+c.point, "HIF_TREE="+s.tree(), "HIF_UPPER="+c.Upper, "HIF_HOME="+s.home(), "HIF_NVM="+s.root())
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	require.NoError(t, cmd.Start())
	// The shell in the container reads its commands from here, so it lives
	// until its first opens have been seen.
	require.Eventually(t, func() bool { return w.Files() > 0 }, 10*time.Second, 5*time.Millisecond)
	_, err = in.Write([]byte("read x < /a\n"))
	require.NoError(t, err)
	in.Close()
	require.NoError(t, cmd.Wait())
	got := ready(w)
	require.Contains(t, s.paths(got), "a")
	for _, f := range got.Files {
		require.False(t, f.Assumed, s.names[f.Ref])
	}
}

// TestHelperMount is the child of TestHiddenMount.
func TestHelperMount(t *testing.T) {
	point := os.Getenv("HIF_POINT")
	if point == "" {
		t.Skip("only as a child of TestHiddenMount")
	}
	upper := os.Getenv("HIF_UPPER")
	mountOverlay(t, point, [][2]string{{"lowerdir+", os.Getenv("HIF_TREE")}, {"datadir+", os.Getenv("HIF_NVM")}, {"datadir+", os.Getenv("HIF_HOME")},
		{"upperdir", upper}, {"workdir", filepath.Join(filepath.Dir(upper), "work")}})
	require.NoError(t, unix.Chroot(point))
	require.NoError(t, unix.Chdir("/"))
	require.NoError(t, unix.Exec("/bin/sh", []string{"sh"}, nil))
}

// Twenty containers of the same layers at once, each with a program of its own.
func TestProfilesDoNotMix(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/sh", "/bin/cat")
	const n, files = 20, 15
	for i := range n {
		for j := range files {
			s.put(placement.Tier(j%2), "4", fmt.Sprintf("app%d/f%d", i, j), []byte("x"))
		}
	}
	tr := s.tracer(s.config())
	watches := make([]*Watch, n)
	conts := make([]*container, n)
	for i := range n {
		conts[i] = s.container(fmt.Sprint(100 + i))
		watches[i] = watch(t, tr, conts[i])
		conts[i].mount()
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			script := fmt.Sprintf("for i in $(cat /app%d/f0) 1 2 3; do cat /app%d/*; done", i, i)
			errs[i] = exec.Command("chroot", conts[i].point, "/bin/sh", "-c", script).Run()
		})
	}
	wg.Wait()
	for i := range n {
		require.NoError(t, errs[i])
		got := ready(watches[i])
		require.True(t, got.Complete)
		want := map[string]bool{}
		for j := range files {
			want[fmt.Sprintf("app%d/f%d", i, j)] = true
		}
		programs := 0
		for _, f := range got.Files {
			require.False(t, f.Assumed)
			if path := s.names[f.Ref]; f.Layer == 4 {
				require.True(t, want[path], "%s in the profile of app%d", path, i)
				delete(want, path)
			} else {
				programs++
			}
		}
		require.Empty(t, want)
		require.Equal(t, 4, programs, "sh, cat, ld.so, libc: %v", s.paths(got))
	}
	require.Zero(t, tr.Stats().Unresolved)
}

// Thousands of processes that are gone before their events are read.
func TestShortLived(t *testing.T) {
	s := newStore(t)
	s.install(placement.NVM, "3", "/bin/sh", "/bin/true")
	const n = 1500
	for i := range n {
		s.put(placement.HDD, "4", fmt.Sprintf("f/%d", i), []byte("x"))
	}
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	run(t, "chroot", c.mount(), "/bin/sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do /bin/true < /f/$i; i=$((i+1)); done", n))
	got := ready(w)
	require.True(t, got.Complete)
	require.Len(t, got.Files, n+4)
	last := time.Duration(-1)
	next := 0
	for _, f := range got.Files {
		require.GreaterOrEqual(t, f.First, last)
		last = f.First
		if f.Layer == 4 {
			require.Equal(t, fmt.Sprintf("f/%d", next), s.names[f.Ref], "order of first use")
			next++
		}
		if s.names[f.Ref] == "bin/true" {
			require.GreaterOrEqual(t, f.Opens, n)
		}
	}
}

func TestOverflow(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("x"))
	cfg := s.config()
	cfg.limitedQueue = true
	tr := s.tracer(cfg)
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	release := hold(t, tr) // nobody reads
	run(t, "cat", m+"/f")
	// Files of its own that a container opens take room in the queue too.
	run(t, "sh", "-c", fmt.Sprintf("i=0; while [ $i -lt 17000 ]; do : > %s/new.$i; i=$((i+1)); done", m))
	release()
	got := ready(w)
	require.False(t, got.Complete)
	require.EqualValues(t, 1, got.Overflows)
	require.Equal(t, []string{"f"}, s.paths(got), "what did arrive is there")
	require.EqualValues(t, 1, tr.Stats().Overflows)

	c = s.container("8")
	w = watch(t, tr, c)
	run(t, "cat", c.mount()+"/f")
	require.True(t, ready(w).Complete, "a later start is not blamed")
}

func TestTooManyFiles(t *testing.T) {
	s := newStore(t)
	for i := range 20 {
		s.put(placement.HDD, "3", fmt.Sprintf("f%d", i), []byte("x"))
	}
	cfg := s.config()
	cfg.Files = 10
	tr := s.tracer(cfg)
	c := s.container("7")
	w := watch(t, tr, c)
	run(t, "sh", "-c", fmt.Sprintf("cat %s/f*", c.mount()))
	got := ready(w)
	require.Len(t, got.Files, 10)
	require.False(t, got.Complete)
	require.EqualValues(t, 10, got.Lost)
}

func TestEnds(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("x"))
	for _, tc := range []struct {
		why  Reason
		cfg  Config
		open bool
	}{
		{EndQuiet, Config{Quiet: time.Millisecond}, true},
		{EndMax, Config{Quiet: time.Hour, Max: time.Millisecond}, true},
		{EndUnused, Config{Unused: time.Millisecond}, false},
		{EndClosed, Config{}, false},
	} {
		t.Run(string(tc.why), func(t *testing.T) {
			tc.cfg.Root = s.root()
			tr := s.tracer(tc.cfg)
			c := s.container("7")
			w := watch(t, tr, c)
			m := c.mount()
			if tc.open {
				run(t, "cat", m+"/f")
			}
			if tc.why == EndClosed {
				require.NoError(t, tr.Close())
				_, err := tr.Watch(c.Start)
				require.ErrorIs(t, err, errdefs.ErrUnavailable)
			}
			got := w.Result()
			require.Equal(t, tc.why, got.Ended)
			require.Equal(t, tc.why != EndClosed, got.Complete)
			require.NoError(t, unix.Unmount(m, 0))
		})
	}
}

// A container opens what must not stop or fool the reader.
func TestOddFiles(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "f", []byte("x"))
	s.put(placement.HDD, "3", "a b\n\\ü (deleted)", []byte("x"))
	s.put(placement.HDD, "3", "bad\xff", []byte("x"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	release := hold(t, tr)
	// A FIFO on the filesystem, opened neither through the mount that is ignored
	// nor through an overlay. When the reader goes on, nobody has it open any more.
	bind := t.TempDir()
	require.NoError(t, unix.Mount(s.nvm, bind, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(bind, unix.MNT_DETACH) })
	run(t, "sh", "-c", `cd "$0" && mkfifo p && (cat p & echo z > p; wait); cat "d$1"`, bind, s.refs["f"].Redirect())
	run(t, "sh", "-c", `cd "$0" && mkfifo p && mkdir 3 && echo y > 3/f && cat 3/f && (cat p & echo z > p; wait)
		cat "$1" "$2"; exec 3< f; rm f; echo w > f; cat f`, m, "a b\n\\ü (deleted)", "bad\xff")
	release()
	got := ready(w)
	require.Equal(t, []string{"a b\n\\ü (deleted)", "bad\xff", "f"}, s.paths(got))
	for _, f := range got.Files {
		require.EqualValues(t, 3, f.Layer)
	}
}

// A temporary file of a container is no layer's, whatever its name.
func TestUnlinkedFileOfTheContainer(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("data"))
	s.put(placement.HDD, "3", "decoy", []byte("data"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	release := hold(t, tr)
	for _, dir := range []string{"/tmp", "/3/ff", "/9/02"} {
		run(t, "sh", "-c", `mkdir -p "$0" && printf data > "$0/2" && cat "$0/2" && rm "$0/2"`, m+dir)
	}
	release()
	run(t, "cat", m+"/f")
	require.Equal(t, []string{"f"}, s.paths(ready(w)))
	require.Equal(t, [2]uint64{placement.HDD: 1}, tr.Stats().Opens)
}
