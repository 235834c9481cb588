// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

func noPace(int) error { return nil }

func TestPromoteAndDemote(t *testing.T) {
	s := open(t)
	require.NoError(t, os.MkdirAll(filepath.Join(s.Data(placement.HDD, "7"), "usr/bin"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(s.Data(placement.HDD, "7"), "usr"), 0o710))
	file := "/7/usr/bin/tool"
	write(t, filepath.Join(s.DataRoot(placement.HDD), file), "content")

	_, err := s.Demote(file)
	require.NoError(t, err, "what is not on NVM is no work")
	n, err := s.Promote(t.Context(), file, noPace)
	require.NoError(t, err)
	require.EqualValues(t, 7, n)
	at, err := s.Stands(file)
	require.NoError(t, err)
	require.Equal(t, Standing{7, 7}, at)
	st, err := os.Stat(filepath.Join(s.Data(placement.NVM, "7"), "usr"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o710), st.Mode().Perm())
	n, err = s.Promote(t.Context(), file, noPace)
	require.NoError(t, err)
	require.Zero(t, n)
	n, err = s.Demote(file)
	require.NoError(t, err)
	require.EqualValues(t, 7, n)
	at, err = s.Stands(file)
	require.NoError(t, err)
	require.Equal(t, Standing{-1, 7}, at)
	names, err := readNames(filepath.Join(s.Root(placement.NVM), "s"))
	require.NoError(t, err)
	require.Empty(t, names, "a temporary file is left")

	_, err = s.Promote(t.Context(), "/7/usr/bin/other", noPace)
	require.True(t, errdefs.IsNotFound(err), err)
}

func TestDemoteWantsACopyAtHome(t *testing.T) {
	s := open(t)
	for _, home := range []string{"", "conten"} {
		require.NoError(t, os.MkdirAll(s.Data(placement.NVM, "7"), 0o755))
		write(t, filepath.Join(s.Data(placement.NVM, "7"), "f"), "content")
		if home != "" {
			require.NoError(t, os.MkdirAll(s.Data(placement.HDD, "7"), 0o755))
			write(t, filepath.Join(s.Data(placement.HDD, "7"), "f"), home)
		}
		_, err := s.Demote("/7/f")
		require.True(t, errdefs.IsFailedPrecondition(err), err)
		require.FileExists(t, filepath.Join(s.Data(placement.NVM, "7"), "f"))
	}
}

func TestMovesStayInsideALayer(t *testing.T) {
	s := open(t)
	for _, bad := range []string{"", "/", "7/f", "/7", "/7/", "/7/../8/f", "/../x/y", "/7//f", "/7/./f", "/7/f\x00"} {
		_, err := s.Stands(bad)
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", bad, err)
		_, err = s.Promote(t.Context(), bad, noPace)
		require.Error(t, err)
		_, err = s.Demote(bad)
		require.Error(t, err)
	}
	require.NoError(t, os.MkdirAll(s.Data(placement.HDD, "7"), 0o755))
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(s.Data(placement.HDD, "7"), "f")))
	_, err := s.Promote(t.Context(), "/7/f", noPace)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
}

// A container that has a file open, mapped or running while it changes tier
// goes on with it; one that opens it next finds it at its new place.
func TestMovesUnderAMountedContainer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	s := open(t)
	sleep, err := os.ReadFile("/bin/sleep")
	require.NoError(t, err)
	content := strings.Repeat("0123456789abcdef", 100_000)
	require.NoError(t, os.MkdirAll(s.Data(placement.HDD, "7"), 0o755))
	write(t, filepath.Join(s.Data(placement.HDD, "7"), "data"), content)
	require.NoError(t, os.WriteFile(filepath.Join(s.Data(placement.HDD, "7"), "sleep"), sleep, 0o755))

	tree, root := t.TempDir(), t.TempDir()
	for name, size := range map[string]int64{"data": int64(len(content)), "sleep": int64(len(sleep))} {
		f := filepath.Join(tree, name)
		require.NoError(t, os.WriteFile(f, nil, 0o755))
		require.NoError(t, os.Truncate(f, size))
		require.NoError(t, unix.Setxattr(f, "trusted.overlay.metacopy", nil, 0))
		require.NoError(t, unix.Setxattr(f, "trusted.overlay.redirect", []byte("/7/"+name), 0))
	}
	options := "metacopy=on,lowerdir=" + strings.Join([]string{tree, s.DataRoot(placement.NVM), s.DataRoot(placement.HDD)}, "::")
	require.NoError(t, unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, options))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(root, unix.MNT_DETACH)) })

	running := exec.CommandContext(t.Context(), filepath.Join(root, "sleep"), "1000")
	require.NoError(t, running.Start())
	t.Cleanup(func() { _ = running.Process.Kill(); _ = running.Wait() })
	held, err := os.Open(filepath.Join(root, "data"))
	require.NoError(t, err)
	defer held.Close()
	mapped, err := unix.Mmap(int(held.Fd()), 0, len(content), unix.PROT_READ, unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(mapped)) }()

	check := func() {
		t.Helper()
		_, err := held.Seek(0, io.SeekStart)
		require.NoError(t, err)
		b, err := io.ReadAll(held)
		require.NoError(t, err)
		require.True(t, bytes.Equal(b, []byte(content)), "an open file changed")
		require.True(t, bytes.Equal(mapped, []byte(content)), "a mapped file changed")
		b, err = os.ReadFile(filepath.Join(root, "data"))
		require.NoError(t, err)
		require.True(t, bytes.Equal(b, []byte(content)), "a file opened after the move is wrong")
		require.NoError(t, exec.CommandContext(t.Context(), filepath.Join(root, "sleep"), "0").Run())
		require.NoError(t, running.Process.Signal(unix.Signal(0)), "a running program died")
	}
	for range 3 {
		for _, f := range []string{"/7/data", "/7/sleep"} {
			_, err := s.Promote(t.Context(), f, noPace)
			require.NoError(t, err)
		}
		check()
		for _, f := range []string{"/7/data", "/7/sleep"} {
			_, err := s.Demote(f)
			require.NoError(t, err)
		}
		check()
	}
}

// The record of a layer may be older than what was done with it.
func TestDropCopySparesWhatHasLeftNVM(t *testing.T) {
	s := open(t)
	for _, root := range Tiers {
		require.NoError(t, os.MkdirAll(filepath.Join(s.Data(root, "7"), "usr"), 0o755))
		write(t, filepath.Join(s.Data(root, "7"), "usr/hot"), "content")
		write(t, filepath.Join(s.Data(root, "7"), "usr/cold"), "content")
	}
	_, err := s.Demote("/7/usr/cold")
	require.NoError(t, err)
	require.NoError(t, s.DropCopy("7"))
	for name, want := range map[string]Standing{"/7/usr/hot": {7, -1}, "/7/usr/cold": {-1, 7}} {
		at, err := s.Stands(name)
		require.NoError(t, err)
		require.Equal(t, want, at, name)
	}
	require.NoError(t, os.RemoveAll(s.Data(placement.HDD, "7")))
	require.NoError(t, s.DropCopy("7"), "none was begun")
}
