// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// punch takes the blocks of bytes of a file, as memkind and PMDK do to give memory back.
func punch(t testing.TB, f *os.File, off, n int64) {
	t.Helper()
	require.NoError(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n))
}

// inside opens what a container was given.
func inside(t testing.TB, mount *os.File) *os.File {
	t.Helper()
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// written reports whether all of a file has blocks that were written, so that no store into it waits for the filesystem.
func written(t testing.TB, path string, size int64) bool {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	hole, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE)
	require.NoError(t, err)
	return hole == size
}

// fill takes all that a filesystem has left, and returns what gives it back.
func fill(t testing.TB, dir string) func() {
	t.Helper()
	path := filepath.Join(dir, "full")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	for n := int64(mib); n >= 4096; {
		st, err := f.Stat()
		require.NoError(t, err)
		if err := unix.Fallocate(int(f.Fd()), 0, st.Size(), n); err != nil {
			require.ErrorIs(t, err, unix.ENOSPC)
			n /= 2
		}
	}
	return func() { require.NoError(t, os.Remove(path)) }
}

// A container that punches a hole into its region has its blocks back at once, before others can take them.
func TestPunchedRegionGetsItsBlocksBack(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		s := open(t, dir, Options{})
		p := sleeper(t)
		mount, r, err := s.Attach(t.Context(), api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: 8 * mib}, nil)
		require.NoError(t, err)
		defer mount.Close()
		path := s.data(r.Ref)
		f := inside(t, mount)
		for _, hole := range [][2]int64{{0, 4 * mib}, {5 * mib, 4096}, {0, 8 * mib}} {
			before := blocks(t, path)
			punch(t, f, hole[0], hole[1])
			require.Eventually(t, func() bool { return blocks(t, path) >= before }, waitFor, tick)
		}
		require.Empty(t, s.Problems())
	})
}

// Where NVM is full meanwhile, the region is refused with the reason until there is room, and check says so and repairs it.
func TestPunchedRegionOnFullNVM(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			dir := filesystem(t, kind, 384*mib)
			s, err := Open(ctx, filepath.Join(dir, "r"), Options{})
			require.NoError(t, err)
			r, err := s.Create(ctx, "default", "a", CreateOptions{Size: 32 * mib})
			require.NoError(t, err)
			require.NoError(t, s.Close())
			// No daemon runs, and what is punched is taken by others.
			f, err := os.OpenFile(filepath.Join(s.dir(r.Ref), "data"), os.O_RDWR, 0)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte("kept"), 20*mib)
			require.NoError(t, err)
			punch(t, f, 0, 16*mib)
			require.NoError(t, errors.Join(f.Sync(), f.Close()))
			room := fill(t, dir)

			s = open(t, dir, Options{})
			problems := s.Problems()
			require.Len(t, problems, 1)
			require.ErrorContains(t, problems[r.key()], "have no blocks")
			p := sleeper(t)
			attach := func() error {
				mount, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Volume: "a"}, nil)
				if err == nil {
					mount.Close()
				}
				return err
			}
			err = attach()
			require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
			require.ErrorContains(t, err, "have no blocks")
			v, err := s.Inspect(r.Ref)
			require.NoError(t, err)
			require.Empty(t, v.Users, "nobody was given it")
			rep, err := s.Check(ctx, r.Ref, true)
			require.NoError(t, err)
			require.Len(t, rep.Problems, 1)
			require.Contains(t, rep.Problems[0], "have no blocks")

			room()
			rep, err = s.Check(ctx, r.Ref, true)
			require.NoError(t, err)
			require.Empty(t, rep.Problems)
			require.True(t, written(t, s.data(r.Ref), r.Size))
			require.Empty(t, s.Problems())
			f, err = os.OpenFile(s.data(r.Ref), os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()
			punch(t, f, mib, 4096)
			require.NoError(t, attach())
			require.True(t, written(t, s.data(r.Ref), r.Size))
			var b [4]byte
			_, err = f.ReadAt(b[:], 20*mib)
			require.NoError(t, err)
			require.Equal(t, "kept", string(b[:]))
		})
	}
}

func chattr(t testing.TB, flags, path string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "chattr", flags, path).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// A container with CAP_LINUX_IMMUTABLE can make its file immutable or append-only. It is a region like any other all the same.
func TestImmutableRegion(t *testing.T) {
	for _, flag := range []string{"i", "a"} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			dir := filesystem(t, "ext4", 384*mib)
			s, err := Open(ctx, filepath.Join(dir, "r"), Options{})
			require.NoError(t, err)
			p := sleeper(t)
			mount, r, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: mib}, nil)
			require.NoError(t, err)
			defer mount.Close()
			if flag == "a" {
				f := inside(t, mount)
				chattr(t, "+a", s.data(r.Ref))
				g, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), os.O_WRONLY|os.O_APPEND, 0)
				require.NoError(t, err)
				_, err = g.Write(make([]byte, mib))
				require.NoError(t, errors.Join(err, g.Close(), f.Close()))
				require.Eventually(t, func() bool { st, err := os.Stat(s.data(r.Ref)); return err == nil && st.Size() == mib }, waitFor, tick)
			}
			chattr(t, "+"+flag, s.data(r.Ref))
			require.NoError(t, s.Close())
			end(p)

			s = open(t, dir, Options{})
			require.Empty(t, s.Problems())
			chattr(t, "+"+flag, s.data(r.Ref))
			p = sleeper(t)
			again, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: mib}, nil)
			require.NoError(t, err)
			again.Close()
			end(p)
			chattr(t, "+"+flag, s.data(r.Ref))
			require.NoError(t, s.SetKeep(ctx, r.Ref, true))
			require.NoError(t, s.Release(ctx, "default", "c"))
			_, err = s.Resize(ctx, vol("c"), 2*mib)
			require.NoError(t, err)
			chattr(t, "+"+flag, s.data(vol("c")))
			require.NoError(t, s.Remove(ctx, vol("c")))
			require.Empty(t, s.Problems())
			empty(t, s)
		})
	}
}

// What cannot be removed is left, named and tried again; it is in nobody's way.
func TestWhatCannotBeRemovedIsLeft(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	s, err := Open(ctx, filepath.Join(dir, "r"), Options{Pool: map[int64]int{mib: 1}})
	require.NoError(t, err)
	r, err := s.Create(ctx, "default", "a", CreateOptions{Size: 2 * mib})
	require.NoError(t, err)
	p := sleeper(t)
	mount, own, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: 2 * mib}, nil)
	require.NoError(t, err)
	mount.Close()
	end(p)
	// A mount point in it cannot be removed, by nobody.
	for _, ref := range []Ref{r.Ref, own.Ref} {
		require.NoError(t, unix.Mount("/dev/null", s.data(ref), "", unix.MS_BIND, ""))
	}
	err = s.Remove(ctx, r.Ref)
	require.ErrorContains(t, err, "left")
	require.NoError(t, s.Release(ctx, "default", "c"), "it is no failure of the container's removal")
	require.Empty(t, s.List(""))
	left := func(n int) []string {
		t.Helper()
		var dirs []string
		for name, err := range s.Problems() {
			require.ErrorContains(t, err, "cannot be removed")
			dirs = append(dirs, filepath.Join(s.root, name, "data"))
		}
		require.Len(t, dirs, n)
		return dirs
	}
	dirs := left(2)
	_, err = s.Create(ctx, "default", "a", CreateOptions{Size: 2 * mib})
	require.NoError(t, err)
	require.NoError(t, s.Close())

	s = open(t, dir, Options{Pool: map[int64]int{mib: 1}})
	left(2)
	require.Len(t, s.List(""), 1)
	require.NoError(t, unix.Unmount(dirs[0], 0))
	require.NoError(t, s.Reconcile(ctx))
	left(1)
	require.NoError(t, unix.Unmount(left(1)[0], 0))
	require.NoError(t, s.Reconcile(ctx))
	left(0)
	entries, err := os.ReadDir(filepath.Join(s.root, "tmp"))
	require.NoError(t, err)
	require.Empty(t, entries)
}
