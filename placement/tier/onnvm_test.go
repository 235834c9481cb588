// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

func root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// filesystem mounts a new filesystem of a type.
func filesystem(t *testing.T, kind string) string {
	t.Helper()
	root(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	require.NoError(t, os.Mkdir(dir, 0o755))
	args := []string{"-t", "tmpfs", "-o", "size=64m", "none", dir}
	if kind != "tmpfs" {
		image := filepath.Join(t.TempDir(), "image")
		require.NoError(t, os.WriteFile(image, nil, 0o600))
		require.NoError(t, os.Truncate(image, 320<<20)) // the least that mkfs.xfs takes is 300 MB
		if _, err := exec.LookPath("mkfs." + kind); err != nil {
			t.Skip(err)
		}
		mkfs := []string{"-q", image}
		if kind == "ext4" {
			mkfs = []string{"-q", "-b", "4096", image}
		}
		out, err := exec.CommandContext(t.Context(), "mkfs."+kind, mkfs...).CombinedOutput()
		require.NoError(t, err, string(out))
		args = []string{"-o", "loop", image, dir}
	}
	out, err := exec.CommandContext(t.Context(), "mount", args...).CombinedOutput()
	require.NoError(t, err, string(out))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// on makes a store with its NVM tier on a filesystem.
func on(t *testing.T, nvm string) *Store {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(filepath.Join(dir, "hdd"), filepath.Join(nvm, "nvm"), filepath.Join(dir, "state"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// both puts a file of a layer on both tiers.
func both(t *testing.T, s *Store, redirect, content string) {
	t.Helper()
	for _, tr := range Tiers {
		f := filepath.Join(s.DataRoot(tr), redirect)
		require.NoError(t, os.MkdirAll(filepath.Dir(f), 0o755))
		write(t, f, content)
	}
}

// container mounts a file of a store as containers see it.
func container(t *testing.T, s *Store, redirect string, size int) (dir, options string) {
	t.Helper()
	tree := t.TempDir()
	f := filepath.Join(tree, "f")
	require.NoError(t, os.WriteFile(f, nil, 0o755))
	require.NoError(t, os.Truncate(f, int64(size)))
	require.NoError(t, unix.Setxattr(f, "trusted.overlay.metacopy", nil, 0))
	require.NoError(t, unix.Setxattr(f, "trusted.overlay.redirect", []byte(redirect), 0))
	return t.TempDir(), "metacopy=on,lowerdir=" + strings.Join([]string{tree, s.DataRoot(placement.NVM), s.DataRoot(placement.HDD)}, "::")
}

func TestPins(t *testing.T) {
	content := strings.Repeat("0123456789abcdef", 4096)
	const bytes = 65536
	for _, kind := range []string{"ext4", "xfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			s := on(t, filesystem(t, kind))
			pins, err := s.Pins()
			require.NoError(t, err)
			defer pins.Close()
			demote := func(redirect string, want int64) {
				t.Helper()
				freed, held, err := s.DemoteAll([]string{redirect}, pins)
				require.NoError(t, err)
				require.Equal(t, [2]int64{bytes - want, want}, [2]int64{freed, held})
				require.Equal(t, want, pins.Bytes())
			}
			path := filepath.Join(s.DataRoot(placement.NVM), "7", "f")

			both(t, s, "/7/f", content)
			demote("/7/f", 0)

			both(t, s, "/7/f", content)
			f, err := os.Open(path)
			require.NoError(t, err)
			demote("/7/f", bytes)
			require.NoError(t, f.Close())
			require.Zero(t, pins.Bytes(), "closed")

			both(t, s, "/7/f", content)
			f, err = os.Open(path)
			require.NoError(t, err)
			mapped, err := unix.Mmap(int(f.Fd()), 0, bytes, unix.PROT_READ, unix.MAP_SHARED)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			demote("/7/f", bytes)
			require.NoError(t, unix.Munmap(mapped))
			require.Zero(t, pins.Bytes(), "unmapped")

			// Through the overlay of a container, in a mount namespace of its own.
			both(t, s, "/7/f", content)
			dir, options := container(t, s, "/7/f", len(content))
			if kind == "ext4" { // a container's overlay can be written to, one of a tree alone cannot
				options += ",upperdir=" + t.TempDir() + ",workdir=" + t.TempDir()
			}
			cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-ec", `
				mount -t overlay -o "$1" overlay "$2"; exec 3<"$2/f"; echo open; read x; exec 3<&-; echo closed; read x`, "sh", options, dir)
			in, err := cmd.StdinPipe()
			require.NoError(t, err)
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			cmd.Stderr = os.Stderr
			require.NoError(t, cmd.Start())
			t.Cleanup(func() { _ = cmd.Process.Kill() })
			says := func(want string) {
				b := make([]byte, len(want)+1)
				_, err := io.ReadFull(out, b)
				require.NoError(t, err)
				require.Equal(t, want+"\n", string(b))
			}
			says("open")
			demote("/7/f", bytes)
			_, err = io.WriteString(in, "\n")
			require.NoError(t, err)
			says("closed")
			require.EqualValues(t, bytes, pins.Bytes(), "the overlay has the file in its cache, though nobody has it open")
			inside := filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "root", dir)
			require.NoError(t, LetGo(inside))
			require.Zero(t, pins.Bytes(), "the overlay has let go of it")
			require.NoError(t, in.Close())
			_ = cmd.Wait() // the shell's last read met the end
			require.Zero(t, pins.Bytes(), "the container is gone")
		})
	}
}

func TestOnNVM(t *testing.T) {
	s := on(t, filesystem(t, "ext4"))
	both(t, s, "/7/usr/bin/a", strings.Repeat("x", 5000))
	dir := s.Data(placement.NVM, "7")
	require.NoError(t, os.Link(filepath.Join(dir, "usr/bin/a"), filepath.Join(dir, "usr/b")))
	require.NoError(t, os.Symlink("b", filepath.Join(dir, "usr/link")))
	write(t, filepath.Join(dir, "empty"), "")
	var names, data []string
	for e, err := range s.OnNVM("7") {
		require.NoError(t, err)
		names = append(names, e.Redirect)
		if e.Data() {
			data = append(data, e.Redirect)
			require.EqualValues(t, 8192, e.Bytes)
			require.EqualValues(t, 2, e.Links)
		}
	}
	require.Equal(t, []string{"/7", "/7/empty", "/7/usr", "/7/usr/b", "/7/usr/bin", "/7/usr/bin/a", "/7/usr/link"}, names)
	require.Equal(t, []string{"/7/usr/b", "/7/usr/bin/a"}, data)
	n, err := s.Occupied("7")
	require.NoError(t, err)
	require.EqualValues(t, 3*4096+8192, n, "three directories and one file")
	n, err = s.Occupied("8")
	require.NoError(t, err)
	require.Zero(t, n)
	for _, bad := range []string{"", ".", "..", "../d", "a/../b"} {
		_, err = s.Occupied(bad)
		require.True(t, errdefs.IsInvalidArgument(err), "%q", bad)
	}
	for _, err := range s.OnNVM("7") {
		require.NoError(t, err)
		break
	}
}

func TestDemoteAllNamesAndPrune(t *testing.T) {
	s := on(t, filesystem(t, "ext4"))
	both(t, s, "/7/usr/bin/a", "content")
	both(t, s, "/7/keep/f", "content")
	nvm, hdd := s.Data(placement.NVM, "7"), s.Data(placement.HDD, "7")
	require.NoError(t, os.Link(filepath.Join(nvm, "usr/bin/a"), filepath.Join(nvm, "usr/b")))
	names := []string{"/7/usr/b", "/7/usr/bin/a"}

	// One name is not at home: none goes.
	_, _, err := s.DemoteAll(names, nil)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.FileExists(t, filepath.Join(nvm, "usr/bin/a"))
	require.NoError(t, os.Link(filepath.Join(hdd, "usr/bin/a"), filepath.Join(hdd, "usr/b")))
	freed, held, err := s.DemoteAll(names, nil)
	require.NoError(t, err)
	require.Equal(t, [2]int64{4096, 0}, [2]int64{freed, held})
	freed, held, err = s.DemoteAll(names, nil)
	require.NoError(t, err)
	require.Zero(t, freed+held)

	for _, d := range []string{"nvm-only", "usr/empty"} {
		require.NoError(t, os.Mkdir(filepath.Join(nvm, d), 0o755))
		require.NoError(t, os.Symlink("x", filepath.Join(nvm, d, "link")))
	}
	require.NoError(t, os.Mkdir(filepath.Join(hdd, "usr/empty"), 0o755))
	require.NoError(t, os.Symlink("x", filepath.Join(nvm, "keep/link")))
	write(t, filepath.Join(nvm, "keep/empty"), "")
	require.NoError(t, unix.Mknod(filepath.Join(nvm, "usr/whiteout"), unix.S_IFCHR, 0))
	require.NoError(t, unix.Mkfifo(filepath.Join(nvm, "usr/pipe"), 0o600))
	before, err := s.Occupied("7")
	require.NoError(t, err)
	freed, err = s.Prune("7")
	require.NoError(t, err)
	after, err := s.Occupied("7")
	require.NoError(t, err)
	require.Equal(t, before-after, freed)
	require.EqualValues(t, 3*4096, freed, "usr, usr/bin and usr/empty")
	var left []string
	for e, err := range s.OnNVM("7") {
		require.NoError(t, err)
		left = append(left, e.Redirect)
	}
	require.Equal(t, []string{"/7", "/7/keep", "/7/keep/f", "/7/nvm-only", "/7/nvm-only/link"}, left, "what HDD does not have stays")
	freed, err = s.Prune("7")
	require.NoError(t, err)
	require.Zero(t, freed)
	_, err = s.Prune("8")
	require.NoError(t, err)
}

// A directory that a promotion did not finish is finished by the next.
func TestPromoteMendsHalfMadeDirectories(t *testing.T) {
	s := open(t)
	root(t)
	require.NoError(t, os.MkdirAll(filepath.Join(s.Data(placement.HDD, "7"), "d"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(s.Data(placement.HDD, "7"), "d"), 0o750|os.ModeSetgid))
	require.NoError(t, os.Chown(filepath.Join(s.Data(placement.HDD, "7"), "d"), 7, 8))
	require.NoError(t, os.Chmod(filepath.Join(s.Data(placement.HDD, "7"), "d"), 0o750|os.ModeSetgid))
	write(t, filepath.Join(s.Data(placement.HDD, "7"), "d/f"), "x")
	require.NoError(t, os.MkdirAll(filepath.Join(s.Data(placement.NVM, "7"), "d"), 0o700))
	_, err := s.Promote(t.Context(), "/7/d/f", noPace)
	require.NoError(t, err)
	st, err := os.Stat(filepath.Join(s.Data(placement.NVM, "7"), "d"))
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|os.ModeSetgid|0o750, st.Mode())
	require.Equal(t, [2]uint32{7, 8}, [2]uint32{stat(st).Uid, stat(st).Gid})
}

// What a promotion left that was killed goes when the daemon starts.
func TestLeftoversOfPromotions(t *testing.T) {
	s := open(t)
	write(t, filepath.Join(s.Root(placement.NVM), "s", ".up-123"), "half")
	ids, err := s.IDs()
	require.NoError(t, err)
	require.Empty(t, ids)
	require.NoFileExists(t, filepath.Join(s.Root(placement.NVM), "s", ".up-123"))
}
