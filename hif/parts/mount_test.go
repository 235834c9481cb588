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
)

// Reads at random places, by read(2) and through mappings, and a program that runs.
func TestUseOfDividedFiles(t *testing.T) {
	s := newStand(t)
	program, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	const size = 300*Chunk + 777
	s.put("/3/program", program)
	s.put("/3/data", random(size))
	hot := func(n int64) (r []Range) {
		for range 40 {
			r = append(r, Range{rand.Int64N(n), rand.Int64N(3 * Chunk)})
		}
		return Hot(n, r, 0)
	}
	s.write([]File{{"/3/data", size, hot(size)}, {"/3/program", int64(len(program)), hot(int64(len(program)))}})
	p := s.point("7")
	s.mount(p)
	m := s.overlay(p)

	out, err := exec.CommandContext(t.Context(), m+"/3/program", "-test.run=^$", "-test.v").CombinedOutput()
	require.NoError(t, err)
	require.Contains(t, string(out), "PASS")

	want := s.data["/3/data"]
	f, err := os.Open(m + "/3/data")
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
	s.put("/3/f", random(4*Chunk))
	s.put("/3/other", random(10))
	s.write([]File{{"/3/f", 4 * Chunk, nil}})
	p := s.point("7")
	s.mount(p)
	m := s.overlay(p)
	other := random(4*Chunk + 8)[8:]
	require.NoError(t, os.Mkdir(s.roots.NVM+"/3", 0o755))
	require.NoError(t, os.WriteFile(s.roots.NVM+"/3/f", other, 0o644))
	got, err := os.ReadFile(m + "/3/f")
	require.NoError(t, err)
	require.True(t, bytes.Equal(other, got))
	got, err = os.ReadFile(m + "/3/other")
	require.NoError(t, err)
	require.True(t, bytes.Equal(s.data["/3/other"], got))

	// Hot chunks are taken from there, too.
	s.write([]File{{"/3/f", 4 * Chunk, []Range{{0, 4 * Chunk}}}})
	require.ErrorIs(t, Verify(t.Context(), s.image, s.roots.HDD, noPace), errdefs.ErrDataLoss)
}

// A new image takes the place of one that is in use; who has the old one keeps it, also when all is unmounted.
func TestReplaceWhileInUse(t *testing.T) {
	s := newStand(t)
	const size = 50 * Chunk
	s.put("/3/f", random(size))
	p := s.point("7")
	s.write([]File{{"/3/f", size, []Range{{0, Chunk}}}})
	s.mount(p)
	first := s.overlay(p)
	f, err := os.Open(first + "/3/f")
	require.NoError(t, err)
	defer f.Close()
	read := func(f *os.File) {
		t.Helper()
		off := rand.Int64N(size - 5000)
		buf := make([]byte, 5000)
		_, err := f.ReadAt(buf, off)
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data["/3/f"][off:off+5000], buf))
	}
	read(f)
	for i := range int64(5) {
		s.write([]File{{"/3/f", size, []Range{{(i + 1) * 2 * Chunk, Chunk}}}})
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
	require.NoError(t, os.Remove(s.roots.HDD+"/3/f"))
	require.NoDirExists(t, p)
	for _, m := range []string{first, second} {
		g, err := os.Open(m + "/3/f")
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
	s.put("/3/dir/f", random(size))
	s.write([]File{{"/3/dir/f", size, Hot(size, nil, 0)}})
	p := s.point("7")
	s.mount(p)
	require.NoError(t, Unmount(p))
	file := s.roots.HDD + "/3/dir/f"
	for _, tc := range []struct {
		what string
		do   func() error
		want error
	}{
		{"another size", func() error { return os.Truncate(file, size+1) }, errdefs.ErrFailedPrecondition},
		{"gone", func() error { return os.Rename(file, file+".away") }, errdefs.ErrNotFound},
		{"a link", func() error { return os.Symlink("f.away", file) }, unix.ELOOP},
		{"a FIFO", func() error { return unix.Mkfifo(file, 0o644) }, errdefs.ErrFailedPrecondition},
		{"a directory", func() error { return os.Mkdir(file, 0o755) }, errdefs.ErrFailedPrecondition},
		{"a link on the way", func() error { return os.Symlink("dir2", filepath.Dir(file)) }, unix.ELOOP},
		{"a file on the way", func() error { return os.WriteFile(filepath.Dir(file), nil, 0o644) }, errdefs.ErrNotFound},
	} {
		if strings.HasSuffix(tc.what, "way") {
			require.NoError(t, os.RemoveAll(filepath.Dir(file)))
		} else {
			_ = os.Remove(file + map[bool]string{true: "-"}[tc.what == "gone"])
		}
		if tc.what == "another size" {
			require.NoError(t, os.WriteFile(file, nil, 0o644))
		}
		require.NoError(t, tc.do(), tc.what)
		err := Mount(s.image, p, s.roots.HDD)
		require.ErrorIs(t, err, tc.want, tc.what)
		require.ErrorContains(t, err, "/3/dir/f", tc.what)
		require.False(t, Mounted(p))
		_, err = Write(t.Context(), s.image, s.roots, Set{Files: []File{{"/3/dir/f", size, Hot(size, nil, 0)}}}, noPace)
		require.ErrorIs(t, err, tc.want, tc.what)
	}
	require.ErrorIs(t, Mount(filepath.Join(t.TempDir(), "missing"), p, s.roots.HDD), os.ErrNotExist)
}

func TestManyDevices(t *testing.T) {
	s := newStand(t)
	var files []File
	for i := range 400 {
		name := fmt.Sprintf("/3/%s/%d", strings.Repeat("long", 50), i)
		s.put(name, random(3*Chunk+i))
		files = append(files, File{name, int64(3*Chunk + i), Hot(int64(3*Chunk+i), []Range{{int64(i%3) * Chunk, 1}}, 0)})
	}
	s.write(sorted(files))
	p := s.point("7")
	s.mount(p)
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
	name := "/3/large"
	require.NoError(t, os.Mkdir(s.roots.HDD+"/3", 0o755))
	f, err := os.Create(s.roots.HDD + name)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, f.Truncate(size))
	marks := []int64{0, 1 << 30, 2<<30 - 3, 3<<30 + 12345, 4<<30 - 1, 4<<30 + 65536, size - 8}
	var touched []Range
	for i, at := range marks {
		_, err := f.WriteAt([]byte(fmt.Sprintf("mark%04d", i)), at)
		require.NoError(t, err)
		if i%2 == 0 {
			touched = append(touched, Range{at, 8})
		}
	}
	s.hole(name, name, size)
	st := s.write([]File{{name, size, Hot(size, touched, 0)}})
	require.Less(t, st.Bytes, int64(size/500+2<<20), "its index, and what is hot")
	require.NoError(t, Verify(t.Context(), s.image, s.roots.HDD, noPace))
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

func TestOddNames(t *testing.T) {
	s := newStand(t)
	var files []File
	add := func(name string, size int64) { files = append(files, File{name, size, Hot(size, nil, 0)}) }
	for _, name := range []string{"/3/a-b", "/3/a/b", "/3/a/b-c", "/3/a/b.d", "/3/\xff\xfe", "/3/a b\n:,\\", "/3/" + strings.Repeat("n", 255), "/3/-", "/3/ü/…", "/3/..."} {
		s.put(name, random(2*Chunk+100))
		add(name, 2*Chunk+100)
	}
	// Deeper than any path that the kernel takes in one piece.
	long := "/4"
	dir, err := unix.Open(s.roots.HDD, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for part := "4"; ; part = strings.Repeat("p", 200) {
		require.NoError(t, unix.Mkdirat(dir, part, 0o755))
		next, err := unix.Openat(dir, part, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		unix.Close(dir)
		dir = next
		if part != "4" {
			long += "/" + part
		}
		if len(long)+201 > maxPath-10 {
			break
		}
	}
	long += "/" + strings.Repeat("f", maxPath-len(long)-1)
	require.Len(t, long, maxPath)
	fd, err := unix.Openat(dir, long[strings.LastIndexByte(long, '/')+1:], unix.O_CREAT|unix.O_WRONLY, 0o644)
	require.NoError(t, err)
	unix.Close(dir)
	deep := os.NewFile(uintptr(fd), "deep")
	data := random(5*Chunk + 9)
	_, err = deep.Write(data)
	require.NoError(t, err)
	deep.Close()
	s.hole("/deep", long, int64(len(data)))
	add(long, int64(len(data)))

	s.write(sorted(files))
	p := s.point("7")
	s.mount(p)
	m := s.overlay(p)
	for name, data := range s.data {
		got, err := os.ReadFile(m + name)
		require.NoError(t, err, "%q", name)
		require.True(t, bytes.Equal(data, got), "%q", name)
	}
	got, err := os.ReadFile(m + "/deep")
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
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
	unix.Sync()
	require.Eventually(t, func() bool { Forget(name); return pages(t, name) == 0 }, 10*time.Second, time.Millisecond)
}

// The kernel reads no further around a page than the margin is wide.
func TestNothingColdIsRead(t *testing.T) {
	s := newStand(t)
	const size, at = 400 * Chunk, 200 * Chunk
	s.put("/3/f", random(size))
	home := s.roots.HDD + "/3/f"
	for _, margin := range []int64{0, 16 << 10, 128 << 10} {
		set := Set{Files: []File{{"/3/f", size, Hot(size, []Range{{at, 1}}, margin)}}, Margin: margin}
		_, err := Write(t.Context(), s.image, s.roots, set, noPace)
		require.NoError(t, err)
		p := s.point(fmt.Sprint(margin))
		s.mount(p)
		m := s.overlay(p)
		forgotten(t, home)
		f, err := os.Open(m + "/3/f")
		require.NoError(t, err)
		mapped, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
		require.NoError(t, err)
		require.Equal(t, s.data["/3/f"][at], mapped[at])
		require.Zero(t, pages(t, home), "margin %d", margin)
		if os.Getpagesize() == Chunk {
			require.EqualValues(t, max(set.ReadAhead()/Chunk, 1), pages(t, p+"/3/f"), "margin %d", margin)
		}
		require.Equal(t, s.data["/3/f"][2*Chunk], mapped[2*Chunk])
		require.NotZero(t, pages(t, home), "what is cold comes from there")
		require.NoError(t, errors.Join(unix.Munmap(mapped), f.Close()))
	}
}

func TestReadAhead(t *testing.T) {
	s := newStand(t)
	const size = 400 * Chunk
	s.put("/3/f", random(size))
	st := s.write([]File{{"/3/f", size, []Range{{0, size}}}})
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
	nvm, hdd := filepath.Dir(s.roots.NVM), filepath.Dir(s.roots.HDD)
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
