// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// stand is two ext4 tiers, a tree of holes with redirects, and a place for images.
type stand struct {
	t           testing.TB
	roots       Roots
	tree, state string
	image       string
	data        map[string][]byte // by redirect
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %s: %s", name, args, out)
	return string(out)
}

func newStand(t testing.TB) *stand {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts")
	}
	base := t.TempDir()
	s := &stand{t: t, tree: filepath.Join(base, "tree"), state: filepath.Join(base, "state"), data: map[string][]byte{}}
	require.NoError(t, os.Mkdir(s.tree, 0o755))
	require.NoError(t, unix.Mount("tmpfs", s.tree, "tmpfs", 0, "")) // ext4 has no room for the longest redirects
	t.Cleanup(func() { _ = unix.Unmount(s.tree, unix.MNT_DETACH) })
	require.NoError(t, os.Mkdir(s.state, 0o755))
	for _, tier := range []string{"nvm", "hdd"} {
		dir := filepath.Join(base, tier)
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, os.WriteFile(dir+".img", nil, 0o600))
		require.NoError(t, os.Truncate(dir+".img", 4<<30))
		run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard", "-O", "^has_journal", dir+".img")
		run(t, "mount", "-o", "loop", dir+".img", dir)
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	}
	s.roots = Roots{filepath.Join(base, "nvm/d"), filepath.Join(base, "hdd/d")}
	s.image = filepath.Join(base, "nvm/7.erofs")
	return s
}

// put adds a file to the tree with its data on HDD.
func (s *stand) put(redirect string, data []byte) {
	s.t.Helper()
	s.data[redirect] = data
	file := s.roots.HDD + redirect
	require.NoError(s.t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(s.t, os.WriteFile(file, data, 0o644))
	s.hole(redirect, redirect, int64(len(data)))
}

// hole adds a file to the tree.
func (s *stand) hole(path, redirect string, size int64) {
	s.t.Helper()
	hole := s.tree + path
	require.NoError(s.t, os.MkdirAll(filepath.Dir(hole), 0o755))
	require.NoError(s.t, os.WriteFile(hole, nil, 0o755))
	require.NoError(s.t, os.Truncate(hole, size))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.metacopy", nil, 0))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.redirect", []byte(redirect), 0))
}

func (s *stand) write(files []File) Stats {
	s.t.Helper()
	st, err := Write(s.t.Context(), s.image, s.roots, Set{Files: files}, noPace)
	require.NoError(s.t, err)
	return st
}

func noPace(int) error { return nil }

// mount mounts the image, or skips the test where the kernel cannot.
func (s *stand) mount(point string) {
	s.t.Helper()
	err := Mount(s.image, point, s.roots.HDD)
	if errdefs.IsNotImplemented(err) {
		s.t.Skip(err)
	}
	require.NoError(s.t, err)
}

// overlay mounts a container's root filesystem.
func (s *stand) overlay(point string) string {
	s.t.Helper()
	m := filepath.Join(s.t.TempDir(), "m")
	require.NoError(s.t, os.Mkdir(m, 0o755))
	require.NoError(s.t, unix.Mount("overlay", m, "overlay", unix.MS_RDONLY,
		"lowerdir="+s.tree+"::"+s.roots.NVM+"::"+point+"::"+s.roots.HDD))
	s.t.Cleanup(func() { _ = unix.Unmount(m, unix.MNT_DETACH) })
	return m
}

func (s *stand) point(id string) string {
	p := filepath.Join(s.state, id)
	s.t.Cleanup(func() { require.NoError(s.t, Unmount(p)) })
	return p
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for i := 0; i+8 <= n; i += 8 {
		v := r.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}

func TestWholeFilesThroughAnOverlay(t *testing.T) {
	s := newStand(t)
	var files []File
	sizes := []int{1, 4095, 4096, 4097, Chunk - 1, Chunk, Chunk + 1, 3*Chunk + 5000, 20*Chunk + 4097, 40 * Chunk}
	for i, n := range sizes {
		for kind, touched := range map[string][]Range{
			"none": nil, "all": {{0, int64(n)}}, "first": {{0, 1}}, "last": {{int64(n) - 1, 1}},
			"random": {{rand.Int64N(int64(n)), rand.Int64N(int64(n)) + 1}, {rand.Int64N(int64(n)), 1}, {rand.Int64N(int64(n)), 1}},
		} {
			name := "/3/" + string(rune('a'+i)) + "/" + kind
			s.put(name, random(n))
			files = append(files, File{name, int64(n), Hot(int64(n), touched, 0)})
		}
	}
	files = sorted(files)
	st := s.write(files)
	got, err := Read(s.image)
	require.NoError(t, err)
	require.Equal(t, Set{Files: files}, got)
	fi, err := os.Stat(s.image)
	require.NoError(t, err)
	require.Equal(t, fi.Size(), st.Bytes)
	args := []string{"--extract"} // to nowhere: all is read
	for _, f := range files {
		args = append(args, "--device="+s.roots.HDD+f.Redirect)
	}
	if _, err := exec.LookPath("fsck.erofs"); err == nil {
		run(t, "fsck.erofs", append(args, s.image)...)
	}
	require.NoError(t, Verify(t.Context(), s.image, s.roots.HDD, noPace))
	p := s.point("7")
	require.False(t, Current(s.image, p))
	s.mount(p)
	require.True(t, Current(s.image, p))
	m := s.overlay(p)
	for name, data := range s.data {
		b, err := os.ReadFile(m + name)
		require.NoError(t, err, name)
		require.True(t, bytes.Equal(data, b), name)
	}
}

func sorted(files []File) []File {
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Redirect, b.Redirect) })
	return files
}
