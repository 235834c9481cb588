// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func TestTwoContainersOneVolume(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{})
	r, err := s.Create(ctx, "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	_, err = s.Create(ctx, "default", "both", CreateOptions{Size: mib, Shared: true})
	require.NoError(t, err)
	one, two := sleeper(t), sleeper(t)
	attach := func(container string, pid int, volume string) error {
		f, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: container, Pid: pid, Volume: volume}, nil)
		if err == nil {
			f.Close()
		}
		return err
	}
	require.NoError(t, attach("one", one.Process.Pid, "a"))
	err = attach("two", two.Process.Pid, "a")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "container default/one uses it")
	for _, err := range []error{s.Remove(ctx, r.Ref), second(s.Resize(ctx, r.Ref, 2*mib)), second(s.Check(ctx, r.Ref, true))} {
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
	// Its process is not in a control group of its own, so it cannot be frozen, and a copy would be no state that the region ever had.
	_, err = s.Snapshot(ctx, r.Ref, "s")
	require.ErrorContains(t, err, "cannot be frozen")
	end(one)
	require.NoError(t, attach("two", two.Process.Pid, "a"))
	require.NoError(t, attach("three", sleeper(t).Process.Pid, "both"))
	require.NoError(t, attach("two", two.Process.Pid, "both"))
	err = attach("two", two.Process.Pid, "none")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	// Volumes of another namespace cannot be named.
	f, _, err := s.Attach(ctx, api.Attach{Namespace: "other", Container: "x", Pid: two.Process.Pid, Volume: "a"}, nil)
	require.Nil(t, f)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

// A container's region goes with it, stays through its restarts, and is not that of the next container of the same name.
func TestContainerRegion(t *testing.T) {
	ctx := t.Context()
	instances := map[string]string{"default/c": "1"}
	identify := func(_ context.Context, ns, id string) (string, error) {
		if i, ok := instances[ns+"/"+id]; ok {
			return i, nil
		}
		return "", fmt.Errorf("container: %w", errdefs.ErrNotFound)
	}
	var told []string
	s := newStore(t, Options{Identify: identify, Volumes: func(names []string) { told = names }})
	ref := Ref{Container, "default", "c"}
	start := func(size int64) (Record, error) {
		p := sleeper(t)
		defer end(p)
		f, r, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: size}, nil)
		if err == nil {
			f.Close()
		}
		return r, err
	}
	_, err := start(mib)
	require.NoError(t, err)
	put(t, s.data(ref), 7)
	_, err = start(mib)
	require.NoError(t, err)
	n, _ := get(t, s.data(ref))
	require.EqualValues(t, 7, n)
	_, err = start(2 * mib)
	require.ErrorContains(t, err, "has a region of 1m, not 2m")

	// A late event of a container that lives does nothing.
	require.NoError(t, s.Release(ctx, "default", "c"))
	require.Len(t, s.List(""), 1)

	instances["default/c"] = "2"
	_, err = start(2 * mib)
	require.NoError(t, err)
	rep, err := s.Check(ctx, ref, false)
	require.NoError(t, err)
	require.Zero(t, rep.Used)

	delete(instances, "default/c")
	_, err = start(2 * mib)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	require.NoError(t, s.Reconcile(ctx))
	require.Empty(t, s.List(""))
	empty(t, s)

	instances["default/c"] = "3"
	_, err = start(mib)
	require.NoError(t, err)
	put(t, s.data(ref), 9)
	require.NoError(t, s.SetKeep(ctx, ref, true))
	delete(instances, "default/c")
	require.NoError(t, s.Release(ctx, "default", "c"))
	n, _ = get(t, s.data(vol("c")))
	require.EqualValues(t, 9, n)
	require.Equal(t, []string{"c"}, told)
}

// The file of a region has its size, whatever the container does to it; and a lease on it does not stop the daemon.
func TestGuard(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		ctx := t.Context()
		s := open(t, dir, Options{})
		mount, r, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Size: 4 * mib}, nil)
		require.NoError(t, err)
		defer mount.Close()
		path := s.data(r.Ref)
		size := func(n int64) func() bool {
			return func() bool {
				st, err := os.Stat(path)
				return err == nil && st.Size() == n && blocks(t, path) >= n && blocks(t, path) < n+mib
			}
		}
		inside, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), os.O_RDWR, 0)
		require.NoError(t, err)
		defer inside.Close()
		for _, trick := range []func() error{
			func() error { return inside.Truncate(100 * mib) },
			func() error { return unix.Fallocate(int(inside.Fd()), 0, 0, 20*mib) },
			func() error { return second(inside.WriteAt([]byte("beyond"), 9*mib)) },
			func() error { return inside.Truncate(0) },
		} {
			require.NoError(t, trick())
			require.Eventually(t, size(4*mib), waitFor, tick)
		}
		_, err = unix.FcntlInt(inside.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		require.Error(t, err, "a lease is refused, since the daemon has the file open")
		_, err = s.Check(ctx, r.Ref, false)
		require.ErrorContains(t, err, "cannot be frozen") // but it did not hang
	})
}

// What a container is given is one file, and no way to others.
func TestMountShowsOneFile(t *testing.T) {
	s := newStore(t, Options{})
	mount, r, err := s.Attach(t.Context(), api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Size: mib}, nil)
	require.NoError(t, err)
	defer mount.Close()
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(int(mount.Fd()), &st))
	require.EqualValues(t, unix.S_IFREG|0o666, st.Mode)
	require.Equal(t, inode(t, s.data(r.Ref)), st.Ino)
	var fs unix.Statfs_t
	require.NoError(t, unix.Fstatfs(int(mount.Fd()), &fs))
	require.EqualValues(t, unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC, fs.Flags&(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC))
	_, err = unix.Openat(int(mount.Fd()), "../meta", unix.O_RDONLY, 0)
	require.ErrorIs(t, err, unix.ENOTDIR)
	_, err = unix.Openat(int(mount.Fd()), "..", unix.O_RDONLY, 0)
	require.ErrorIs(t, err, unix.ENOTDIR)
	info, err := os.Stat(s.root)
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|0o700, info.Mode())
}

// Two programs that have the same region: the lock of scmlib lets one of them write, through whichever path.
func TestTwoWriters(t *testing.T) {
	s := newStore(t, Options{})
	mount, r, err := s.Attach(t.Context(), api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Size: mib}, nil)
	require.NoError(t, err)
	defer mount.Close()
	one, err := scmlib.Open(fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), scmlib.Options{Create: true, Size: mib})
	require.NoError(t, err)
	_, err = scmlib.Open(s.data(r.Ref), scmlib.Options{})
	require.ErrorIs(t, err, scmlib.ErrLocked)
	require.NoError(t, one.Close())
}
