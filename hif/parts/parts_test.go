// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"errors"
	"fmt"
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

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// stand is two ext4 tiers, a tree of holes with redirects, and a place for images. All that is not on NVM is read from a
// directory on HDD that stands for the view.
type stand struct {
	t           testing.TB
	nvm, home   string
	packs       *packs
	tree, state string
	image       string
	data        map[string][]byte // by redirect
}

// packs are packs as they are written, one file behind the other.
type packs struct {
	dir    string
	blocks map[pack.Ref]uint32
	sizes  map[pack.Ref]int64
	next   map[uint64]int64 // free block, by layer
}

func newPacks(dir string) *packs {
	return &packs{dir, map[pack.Ref]uint32{}, map[pack.Ref]int64{}, map[uint64]int64{}}
}

func (p *packs) PackPath(layer uint64) string { return filepath.Join(p.dir, fmt.Sprint(layer)) }

func (p *packs) PackFile(ref pack.Ref) (uint32, int64, error) {
	size, ok := p.sizes[ref]
	if !ok {
		return 0, 0, errdefs.ErrNotFound
	}
	return p.blocks[ref], size, nil
}

// room gives a file its place.
func (p *packs) room(t testing.TB, redirect string, size int64) (f *os.File, off int64) {
	t.Helper()
	ref, err := pack.ParseRedirect(redirect)
	require.NoError(t, err)
	block := max(p.next[ref.Layer], 1) // the first holds the superblock
	p.blocks[ref], p.sizes[ref], p.next[ref.Layer] = uint32(block), size, block+chunks(size)
	f, err = os.OpenFile(p.PackPath(ref.Layer), os.O_CREATE|os.O_RDWR, 0o600)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(p.next[ref.Layer]*Chunk))
	return f, block * Chunk
}

func (p *packs) add(t testing.TB, redirect string, data []byte) {
	t.Helper()
	f, off := p.room(t, redirect, int64(len(data)))
	_, err := f.WriteAt(data, off)
	require.NoError(t, errors.Join(err, f.Close()))
}

// name is the redirect of a file of layer 3.
func name(number int) string { return pack.Ref{Layer: 3, Number: uint32(number)}.Redirect() }

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
	require.NoError(t, unix.Mount("tmpfs", s.tree, "tmpfs", 0, ""))
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
	s.nvm, s.home = filepath.Join(base, "nvm/d"), filepath.Join(base, "hdd/d")
	s.packs = newPacks(filepath.Join(base, "hdd"))
	s.image = filepath.Join(base, "nvm/7.erofs")
	return s
}

// put adds a file to the tree, its pack and the view.
func (s *stand) put(redirect string, data []byte) {
	s.t.Helper()
	s.data[redirect] = data
	s.packs.add(s.t, redirect, data)
	file := s.home + redirect
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
	st, err := Write(s.t.Context(), s.image, s.nvm, s.packs, Set{Files: sorted(files)}, noPace)
	require.NoError(s.t, err)
	return st
}

func noPace(int) error { return nil }

// mount mounts the image, or skips the test where the kernel cannot.
func (s *stand) mount(point string) {
	s.t.Helper()
	err := Mount(s.image, point, s.packs.PackPath)
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
		"lowerdir="+s.tree+"::"+s.nvm+"::"+point+"::"+s.home))
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
		for _, touched := range [][]Range{
			nil, {{0, int64(n)}}, {{0, 1}}, {{int64(n) - 1, 1}},
			{{rand.Int64N(int64(n)), rand.Int64N(int64(n)) + 1}, {rand.Int64N(int64(n)), 1}, {rand.Int64N(int64(n)), 1}},
		} {
			redirect := pack.Ref{Layer: uint64(10 - i/2), Number: uint32(300*i + len(files) + 1)}.Redirect()
			s.put(redirect, random(n))
			files = append(files, File{redirect, int64(n), Hot(int64(n), touched, 0)})
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
	for layer := range uint64(11) {
		if s.packs.next[layer] > 0 {
			args = append(args, "--device="+s.packs.PackPath(layer))
		}
	}
	require.Len(t, args, 1+5, "one device for each layer")
	if _, err := exec.LookPath("fsck.erofs"); err == nil {
		run(t, "fsck.erofs", append(args, s.image)...)
	}
	require.NoError(t, Verify(t.Context(), s.image, s.packs.PackPath, noPace))
	p := s.point("7")
	require.False(t, Current(s.image, p))
	s.mount(p)
	require.True(t, Current(s.image, p))
	require.NoError(t, os.RemoveAll(s.home)) // nothing is read there
	require.NoError(t, os.Mkdir(s.home, 0o755))
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
