// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// What a daemon may be doing when it is killed. Before each there is a volume "base" of 2 MiB with the number 7.
var works = map[string]func(ctx context.Context, s *Store) error{
	"create": func(ctx context.Context, s *Store) error {
		return second(s.Create(ctx, "default", "made", CreateOptions{Size: mib}))
	},
	"attach": func(ctx context.Context, s *Store) error {
		f, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: os.Getpid(), Size: mib}, nil)
		return errors.Join(err, f.Close())
	},
	"remove":   func(ctx context.Context, s *Store) error { return s.Remove(ctx, vol("base")) },
	"resize":   func(ctx context.Context, s *Store) error { return second(s.Resize(ctx, vol("base"), 6*mib)) },
	"snapshot": func(ctx context.Context, s *Store) error { return second(s.Snapshot(ctx, vol("base"), "snap")) },
	"clone": func(ctx context.Context, s *Store) error {
		return second(s.Clone(ctx, vol("base"), "made", CreateOptions{Size: 4 * mib}))
	},
	"copy": func(ctx context.Context, s *Store) error {
		return second(s.Clone(ctx, vol("base"), "made", CreateOptions{}))
	},
	"import": func(ctx context.Context, s *Store) error {
		var b bytes.Buffer
		if _, err := s.Export(ctx, vol("base"), &b); err != nil {
			return err
		}
		return second(s.Import(ctx, "default", "made", &b))
	},
	"keep": func(ctx context.Context, s *Store) error {
		f, r, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: os.Getpid(), Size: mib}, nil)
		if err != nil {
			return err
		}
		f.Close()
		if err := s.SetKeep(ctx, r.Ref, true); err != nil {
			return err
		}
		return s.Release(ctx, "default", "c")
	},
}

const crashEnv = "REGION_CRASH" // work, directory, step

// TestMain is also the daemon that is killed.
func TestMain(m *testing.M) {
	if what := os.Getenv(crashEnv); what != "" {
		os.Exit(crash(what, os.Getenv(crashEnv+"_DIR"), os.Getenv(crashEnv+"_AT")))
	}
	os.Exit(m.Run())
}

// crashPool is the pool of the daemon that is killed: none, or one region of each size that the works make.
func crashPool() map[int64]int {
	if os.Getenv(crashEnv+"_POOL") == "" {
		return nil
	}
	return map[int64]int{mib: 1, 2 * mib: 1}
}

func crash(what, dir, at string) int {
	n, _ := strconv.ParseInt(at, 10, 64)
	var left atomic.Int64 // steps of the keeper of the pool count as well
	left.Store(n)
	die := func(string) {
		if left.Add(-1) == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	s, err := Open(context.Background(), filepath.Join(dir, "r"), Options{step: die, Pool: crashPool()})
	if err == nil {
		for os.Getenv(crashEnv+"_POOL") != "" && (s.Pooled(mib) == 0 || s.Pooled(2*mib) == 0) {
			time.Sleep(tick)
		}
		err = errors.Join(works[what](context.Background(), s), s.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A daemon that is killed at any step leaves each region whole or not at all, and nothing else.
func TestKilledAtEachStep(t *testing.T) {
	killedAtEachStep(t, "")
}

// With a pool, what it holds is zeros besides: it is given to the next container of any namespace.
func TestKilledAtEachStepWithPool(t *testing.T) {
	killedAtEachStep(t, "yes")
}

func killedAtEachStep(t *testing.T, pool string) {
	for what := range works {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := filesystem(t, "tmpfs", 64*mib)
			steps := 0
			for at := 1; ; at++ {
				require.NoError(t, os.RemoveAll(filepath.Join(dir, "r")))
				prepare(t, dir)
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), crashEnv+"="+what, crashEnv+"_DIR="+dir, crashEnv+"_AT="+strconv.Itoa(at), crashEnv+"_POOL="+pool)
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
					steps++
				} else {
					require.NoError(t, err, "%s", out)
				}
				poolIsZero(t, dir)
				afterwards(t, dir, what)
				if err == nil {
					break
				}
			}
			require.GreaterOrEqual(t, steps, 2)
			t.Logf("killed at %d steps", steps)
		})
	}
}

func poolIsZero(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "r", "pool", "*", "data"))
	require.NoError(t, err)
	for _, file := range files {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		require.True(t, len(bytes.Trim(b, "\x00")) == 0, "%s has content", file)
	}
}

func prepare(t *testing.T, dir string) {
	t.Helper()
	s, err := Open(t.Context(), filepath.Join(dir, "r"), Options{})
	require.NoError(t, err)
	_, err = s.Create(t.Context(), "default", "base", CreateOptions{Size: 2 * mib})
	require.NoError(t, err)
	put(t, s.data(vol("base")), 7)
	require.NoError(t, s.Close())
}

func afterwards(t *testing.T, dir, what string) {
	t.Helper()
	s, err := Open(t.Context(), filepath.Join(dir, "r"), Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	require.Empty(t, s.Problems())
	left, err := os.ReadDir(filepath.Join(s.root, "tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
	_, err = s.Inspect(vol("base"))
	if what == "remove" {
		require.True(t, err == nil || errdefs.IsNotFound(err), "%v", err)
	} else {
		require.NoError(t, err)
	}
	promised := int64(0)
	for _, r := range s.List("") {
		promised += r.charge()
		rep, err := s.Check(t.Context(), r.Ref, false)
		require.NoError(t, err)
		require.Empty(t, rep.Problems, "%s", r.Ref)
		require.Empty(t, r.Frozen)
		require.Zero(t, r.GrowTo)
		if r.Name == "base" || r.Kind == Snapshot || (what == "clone" || what == "copy" || what == "import") && r.Name == "made" {
			n, _ := get(t, s.data(r.Ref))
			require.EqualValues(t, 7, n, "%s", r.Ref)
		}
		if r.Name == "base" && what == "resize" {
			require.Contains(t, []int64{2 * mib, 6 * mib}, r.Size)
		}
	}
	b, err := s.Books()
	require.NoError(t, err)
	require.Equal(t, promised, b.Promised)
	// What was begun can be begun again.
	err = works[what](t.Context(), s)
	require.True(t, err == nil || errdefs.IsAlreadyExists(err) || what == "remove" && errdefs.IsNotFound(err), "%v", err)
}

// A container that was frozen when the daemon was killed is thawed by the next one.
func TestThawedByNextDaemon(t *testing.T) {
	dir := filesystem(t, "tmpfs", 64*mib)
	s, err := Open(t.Context(), filepath.Join(dir, "r"), Options{})
	require.NoError(t, err)
	c := sleeper(t)
	group := ownGroup(t, c.Process.Pid)
	f, r, err := s.Attach(t.Context(), api.Attach{Namespace: "default", Container: "c", Pid: c.Process.Pid, Size: mib}, nil)
	require.NoError(t, err)
	f.Close()
	// As take does it.
	fr, err := freezerOf(c.Process.Pid)
	require.NoError(t, err)
	r.Frozen = []string{fr.file}
	require.NoError(t, s.updateUse(r))
	require.NoError(t, fr.freeze(t.Context()))
	require.NoError(t, s.Close())
	frozen := func() bool {
		b, err := os.ReadFile(fr.done)
		require.NoError(t, err)
		return fr.isFrozen(string(b))
	}
	require.True(t, frozen(), group)
	s = open(t, dir, Options{})
	require.Eventually(t, func() bool { return !frozen() }, waitFor, tick)
	r, err = s.Inspect(r.Ref)
	require.NoError(t, err)
	require.Empty(t, r.Frozen)

	// One that somebody else has stopped stays so; it can be copied all the same.
	other, err := freezerOf(c.Process.Pid)
	require.NoError(t, err)
	require.NoError(t, other.freeze(t.Context()))
	_, err = s.Snapshot(t.Context(), r.Ref, "s")
	require.NoError(t, err)
	require.True(t, frozen())
	require.NoError(t, other.thaw())
	// And one that runs, runs again afterwards.
	_, err = s.Snapshot(t.Context(), r.Ref, "s2")
	require.NoError(t, err)
	require.Eventually(t, func() bool { return !frozen() }, waitFor, tick)
}

// ownGroup puts a process into a control group of its own.
func ownGroup(t *testing.T, pid int) string {
	t.Helper()
	name := "region-test-" + randomID()
	for _, root := range []string{filepath.Join(cgroupRoot, "freezer"), cgroupRoot} {
		dir := filepath.Join(root, name)
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { _ = os.Remove(dir) })
		if os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) != nil {
			continue
		}
		if f, err := freezerOf(pid); err == nil && f != nil {
			t.Cleanup(func() {
				_ = thaw(f.file)
				_ = syscall.Kill(pid, syscall.SIGKILL)
				require.Eventually(t, func() bool { _, err := startOf(pid); return err != nil }, waitFor, tick)
			})
			return dir
		}
	}
	t.Skip("no control group can be made that can be frozen")
	return ""
}

// For how long a container with 64 MiB in use stands still for a snapshot is told, and the snapshot has all of it.
func TestSnapshotOfMuch(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, dir, Options{})
		c := sleeper(t)
		ownGroup(t, c.Process.Pid)
		f, r, err := s.Attach(t.Context(), api.Attach{Namespace: "default", Container: "c", Pid: c.Process.Pid, Size: 96 * mib}, nil)
		require.NoError(t, err)
		f.Close()
		w, err := os.OpenFile(s.data(r.Ref), os.O_RDWR, 0)
		require.NoError(t, err)
		block := bytes.Repeat([]byte("0123456789abcdef"), mib/16)
		for i := range 64 {
			_, err := w.WriteAt(block, int64(i)*mib+int64(i)*4096)
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		image, err := s.Take(t.Context(), r.Ref, nil)
		require.NoError(t, err)
		defer image.Close()
		require.EqualValues(t, 64*mib, image.used)
		require.Positive(t, image.Stood)
		t.Logf("stood still for %v", image.Stood)
		want, err := os.ReadFile(s.data(r.Ref))
		require.NoError(t, err)
		got := make([]byte, r.Size)
		_, err = image.f.ReadAt(got, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
	})
}
