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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Reads at random places, by read(2) and through mappings, and a program that runs.
func TestUseOfDividedFiles(t *testing.T) {
	s := newStand(t)
	program, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	const size = 300*Chunk + 777
	s.put(name(1), program)
	s.put(name(2), random(size))
	hot := func(n int64) (r []Range) {
		for range 40 {
			r = append(r, Range{rand.Int64N(n), rand.Int64N(3 * Chunk)})
		}
		return Hot(n, r, 0)
	}
	s.write([]File{{name(2), size, hot(size)}, {name(1), int64(len(program)), hot(int64(len(program)))}})
	p := s.point("7")
	s.mount(p)
	m := s.overlay(p)

	out, err := exec.CommandContext(t.Context(), m+name(1), "-test.run=^$", "-test.v").CombinedOutput()
	require.NoError(t, err)
	require.Contains(t, string(out), "PASS")

	want := s.data[name(2)]
	f, err := os.Open(m + name(2))
	require.NoError(t, err)
	defer f.Close()
	mapped, err := unix.Mmap(int(f.Fd()), 0, (size+4095)/4096*4096, unix.PROT_READ, unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(mapped)) }()
	for range 300 {
		off := rand.IntN(size)
		n := 1 + rand.IntN(min(size-off, 5*Chunk))
		buf := make([]byte, n)
		_, err := f.ReadAt(buf, int64(off))
		require.NoError(t, err)
		require.True(t, bytes.Equal(want[off:off+n], buf), "%d at %d", n, off)
		off = rand.IntN(size)
		n = 1 + rand.IntN(min(size-off, Chunk))
		require.True(t, bytes.Equal(want[off:off+n], mapped[off:off+n]), "mapped: %d at %d", n, off)
	}
	_, err = unix.Pread(int(f.Fd()), make([]byte, 10), size)
	require.NoError(t, err)
	tail := mapped[size:]
	require.Equal(t, make([]byte, len(tail)), tail, "zeros behind the end of a mapping")
}

// A whole file on NVM is found first, and the parts do not hide others.
func TestWholeFileWins(t *testing.T) {
	s := newStand(t)
	s.put(name(1), random(4*Chunk))
	s.put(name(2), random(10))
	s.write([]File{{name(1), 4 * Chunk, nil}})
	p := s.point("7")
	s.mount(p)
	m := s.overlay(p)
	other := random(4*Chunk + 8)[8:]
	require.NoError(t, os.MkdirAll(filepath.Dir(s.nvm+name(1)), 0o755))
	require.NoError(t, os.WriteFile(s.nvm+name(1), other, 0o644))
	got, err := os.ReadFile(m + name(1))
	require.NoError(t, err)
	require.True(t, bytes.Equal(other, got))
	got, err = os.ReadFile(m + name(2))
	require.NoError(t, err)
	require.True(t, bytes.Equal(s.data[name(2)], got))

	// Hot chunks are taken from there, too.
	s.write([]File{{name(1), 4 * Chunk, []Range{{0, 4 * Chunk}}}})
	require.ErrorIs(t, Verify(t.Context(), s.image, s.packs.PackPath, noPace), errdefs.ErrDataLoss)
}

// A new image takes the place of one that is in use; who has the old one keeps it, also when all is unmounted.
func TestReplaceWhileInUse(t *testing.T) {
	s := newStand(t)
	const size = 50 * Chunk
	s.put(name(1), random(size))
	p := s.point("7")
	s.write([]File{{name(1), size, []Range{{0, Chunk}}}})
	s.mount(p)
	first := s.overlay(p)
	f, err := os.Open(first + name(1))
	require.NoError(t, err)
	defer f.Close()
	read := func(f *os.File) {
		t.Helper()
		off := rand.Int64N(size - 5000)
		buf := make([]byte, 5000)
		_, err := f.ReadAt(buf, off)
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data[name(1)][off:off+5000], buf))
	}
	read(f)
	for i := range int64(5) {
		s.write([]File{{name(1), size, []Range{{(i + 1) * 2 * Chunk, Chunk}}}})
		require.False(t, Current(s.image, p))
		s.mount(p)
		require.True(t, Current(s.image, p))
		read(f)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.Equal(t, 1, strings.Count(string(table), " "+p+" "), "none is left beneath")
	second := s.overlay(p)
	require.NoError(t, Unmount(p))
	require.NoError(t, Unmount(p), "again")
	require.NoError(t, os.Remove(s.image))
	require.NoError(t, os.Remove(s.packs.PackPath(3)))
	require.NoError(t, os.Remove(s.home+name(1)))
	require.NoDirExists(t, p)
	for _, m := range []string{first, second} {
		g, err := os.Open(m + name(1))
		require.NoError(t, err)
		for range 20 {
			read(g)
			read(f)
		}
		g.Close()
	}
}

func TestMountRefuses(t *testing.T) {
	s := newStand(t)
	const size = 4*Chunk + 1
	s.put(name(1), random(size))
	files := []File{{name(1), size, nil}}
	s.write(files)
	p := s.point("7")
	s.mount(p)
	require.NoError(t, Unmount(p))
	file := s.packs.PackPath(3)
	for _, tc := range []struct {
		what string
		do   func() error
		want error
	}{
		{"cut off", func() error { return os.Truncate(file, 5*Chunk) }, errdefs.ErrFailedPrecondition},
		{"gone", func() error { return os.Rename(file, file+".away") }, errdefs.ErrNotFound},
		{"a link", func() error { return os.Symlink("3.away", file) }, errdefs.ErrFailedPrecondition},
		{"a FIFO", func() error { return unix.Mkfifo(file, 0o644) }, errdefs.ErrFailedPrecondition},
		{"a directory", func() error { return os.Mkdir(file, 0o755) }, errdefs.ErrFailedPrecondition},
		{"a file on the way", func() error { s.packs.dir = file + ".away"; return nil }, errdefs.ErrNotFound},
	} {
		if tc.what != "cut off" && tc.what != "gone" {
			_ = os.Remove(file)
		}
		require.NoError(t, tc.do(), tc.what)
		err := Mount(s.image, p, s.packs.PackPath)
		require.ErrorIs(t, err, tc.want, tc.what)
		require.ErrorContains(t, err, "pack of layer 3", tc.what)
		require.False(t, Mounted(p))
		_, err = Write(t.Context(), s.image, s.nvm, s.packs, Set{Files: files}, noPace)
		require.ErrorIs(t, err, tc.want, tc.what)
	}
	require.ErrorIs(t, Mount(filepath.Join(t.TempDir(), "missing"), p, s.packs.PackPath), os.ErrNotExist)
}

// What stands on NVM in place of a file is not copied, and no link there is followed.
func TestWriteRefusesWhatIsOnNVM(t *testing.T) {
	nvm, packs, path := plain(t)
	const size = 4*Chunk + 1
	packs.add(t, name(1), random(size))
	file := nvm + name(1)
	dir := filepath.Dir(file)
	set := Set{Files: []File{{name(1), size, []Range{{0, Chunk}}}}}
	for _, tc := range []struct {
		what string
		do   func() error
		want error
	}{
		{"another size", func() error { return os.WriteFile(file, make([]byte, size+1), 0o600) }, errdefs.ErrFailedPrecondition},
		{"a link", func() error { return os.Symlink(packs.PackPath(3), file) }, unix.ELOOP},
		{"a FIFO", func() error { return unix.Mkfifo(file, 0o644) }, errdefs.ErrFailedPrecondition},
		{"a directory", func() error { return os.Mkdir(file, 0o755) }, errdefs.ErrFailedPrecondition},
		{"a link on the way", func() error { return errors.Join(os.Remove(dir), os.Symlink(packs.dir, dir)) }, unix.ELOOP},
	} {
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.RemoveAll(file))
		require.NoError(t, tc.do(), tc.what)
		_, err := Write(t.Context(), path, nvm, packs, set, noPace)
		require.ErrorIs(t, err, tc.want, tc.what)
		require.ErrorContains(t, err, name(1), tc.what)
	}
	require.NoError(t, os.Remove(dir))
	_, err := Write(t.Context(), path, nvm, packs, set, noPace)
	require.NoError(t, err, "it need not be there")
}

// One device for each layer, at paths of any length.
func TestManyDevices(t *testing.T) {
	s := newStand(t)
	s.packs.dir = filepath.Join(s.packs.dir, strings.Repeat("long, \\of: \n", 15), strings.Repeat("long", 50))
	require.NoError(t, os.MkdirAll(s.packs.dir, 0o755))
	var files []File
	for i := range 800 {
		name := pack.Ref{Layer: uint64(1000 + i%400), Number: uint32(i + 1)}.Redirect()
		s.put(name, random(3*Chunk+i))
		files = append(files, File{name, int64(3*Chunk + i), Hot(int64(3*Chunk+i), []Range{{int64(i%3) * Chunk, 1}}, 0)})
	}
	s.write(files)
	p := s.point("7")
	s.mount(p)
	require.NoError(t, os.RemoveAll(s.home))
	require.NoError(t, os.Mkdir(s.home, 0o755))
	m := s.overlay(p)
	for name, data := range s.data {
		got, err := os.ReadFile(m + name)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got), name)
	}
}

// More than 4 GiB, with holes.
func TestLargeFile(t *testing.T) {
	s := newStand(t)
	const size = 5<<30 + 4096*3 + 17
	name := name(1)
	f, base := s.packs.room(t, name, size)
	defer f.Close()
	marks := []int64{0, 1 << 30, 2<<30 - 3, 3<<30 + 12345, 4<<30 - 1, 4<<30 + 65536, size - 8}
	var touched []Range
	for i, at := range marks {
		_, err := f.WriteAt([]byte(fmt.Sprintf("mark%04d", i)), base+at)
		require.NoError(t, err)
		if i%2 == 0 {
			touched = append(touched, Range{at, 8})
		}
	}
	s.hole(name, name, size)
	st := s.write([]File{{name, size, Hot(size, touched, 0)}})
	require.Less(t, st.Bytes, int64(size/500+2<<20), "its index, and what is hot")
	require.NoError(t, Verify(t.Context(), s.image, s.packs.PackPath, noPace))
	p := s.point("7")
	s.mount(p)
	g, err := os.Open(s.overlay(p) + name)
	require.NoError(t, err)
	defer g.Close()
	for i, at := range marks {
		buf := make([]byte, 8)
		_, err := g.ReadAt(buf, at)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("mark%04d", i), string(buf))
		_, err = g.ReadAt(buf, min(at+3*Chunk, size-20))
		require.NoError(t, err)
		require.Equal(t, make([]byte, 8), buf, "a hole")
	}
}

func pages(t *testing.T, name string) uint64 {
	t.Helper()
	f, err := os.Open(name)
	require.NoError(t, err)
	defer f.Close()
	var st unix.Cachestat_t
	require.NoError(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))
	return st.Cache
}

// forgotten waits until nothing of a file is cached: what is dirty or being read stays.
func forgotten(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	require.NoError(t, err)
	require.NoError(t, unix.Syncfs(int(f.Fd()))) // no other disk: those of other tests may lose what they were not asked to keep
	require.NoError(t, f.Close())
	require.Eventually(t, func() bool { Forget(name); return pages(t, name) == 0 }, 10*time.Second, time.Millisecond)
}

// The kernel reads no further around a page than the margin is wide.
func TestNothingColdIsRead(t *testing.T) {
	s := newStand(t)
	const size, at = 400 * Chunk, 200 * Chunk
	s.put(name(1), random(size))
	home := s.packs.PackPath(3)
	for _, margin := range []int64{0, 16 << 10, 128 << 10} {
		set := Set{Files: []File{{name(1), size, Hot(size, []Range{{at, 1}}, margin)}}, Margin: margin}
		_, err := Write(t.Context(), s.image, s.nvm, s.packs, set, noPace)
		require.NoError(t, err)
		p := s.point(fmt.Sprint(margin))
		s.mount(p)
		m := s.overlay(p)
		forgotten(t, home)
		f, err := os.Open(m + name(1))
		require.NoError(t, err)
		mapped, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
		require.NoError(t, err)
		require.Equal(t, s.data[name(1)][at], mapped[at])
		require.Zero(t, pages(t, home), "margin %d", margin)
		if os.Getpagesize() == Chunk {
			require.EqualValues(t, max(set.ReadAhead()/Chunk, 1), pages(t, p+name(1)), "margin %d", margin)
		}
		require.Equal(t, s.data[name(1)][2*Chunk], mapped[2*Chunk])
		require.NotZero(t, pages(t, home), "what is cold comes from there")
		require.NoError(t, errors.Join(unix.Munmap(mapped), f.Close()))
	}
}

func TestReadAhead(t *testing.T) {
	s := newStand(t)
	const size = 400 * Chunk
	s.put(name(1), random(size))
	st := s.write([]File{{name(1), size, []Range{{0, size}}}})
	forgotten(t, s.image)
	require.EqualValues(t, 2*aheadStep, ReadAhead(s.image, 2*aheadStep))
	require.Eventually(t, func() bool { return pages(t, s.image) == 2*aheadStep/uint64(os.Getpagesize()) }, 10*time.Second, time.Millisecond)
	require.Equal(t, st.Bytes, ReadAhead(s.image, 1<<40))
	all := uint64(st.Bytes+int64(os.Getpagesize())-1) / uint64(os.Getpagesize())
	require.Eventually(t, func() bool { return pages(t, s.image) == all }, 10*time.Second, time.Millisecond)
	forgotten(t, s.image)
	require.Zero(t, ReadAhead(s.image+"-", 1<<40))
	Forget(s.image + "-")
}

func TestProbe(t *testing.T) {
	s := newStand(t)
	nvm, hdd := filepath.Dir(s.nvm), filepath.Dir(s.home)
	if err := Probe(t.Context(), nvm, hdd); err != nil {
		require.ErrorIs(t, err, errdefs.ErrNotImplemented)
		t.Skip(err)
	}
	memory := filepath.Join(t.TempDir(), "memory")
	require.NoError(t, os.Mkdir(memory, 0o755))
	require.NoError(t, unix.Mount("tmpfs", memory, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(memory, unix.MNT_DETACH)) })
	// Like a DAX filesystem, tmpfs cannot have a filesystem in a file.
	require.ErrorIs(t, Probe(t.Context(), memory, hdd), errdefs.ErrNotImplemented)
	require.NoError(t, Probe(t.Context(), nvm, memory), "cold chunks may lie there")
	for _, dir := range []string{nvm, hdd, memory} {
		left, err := filepath.Glob(dir + "/.parts-*")
		require.NoError(t, err)
		require.Empty(t, left)
	}
	require.ErrorIs(t, Probe(t.Context(), filepath.Join(memory, "missing"), hdd), syscall.ENOENT)
}
