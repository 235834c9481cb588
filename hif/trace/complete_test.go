// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// What strace says was opened: "…openat(AT_FDCWD, "/etc/x", O_RDONLY…) = 3",
// and programs that were executed.
var (
	opened   = regexp.MustCompile(`open(?:at)?\((?:AT_FDCWD(?:<[^>]*>)?, )?"([^"]+)", ([A-Z_|0-9]+)[^)]*\) += [0-9]`)
	executed = regexp.MustCompile(`execve\("([^"]+)".*\) += 0`)
)

// The judge of completeness is strace: every regular file of the tree that it
// sees opened or executed must be in the trace, and nothing else but the ELF
// interpreter, which the kernel opens by itself.
func TestCompleteAgainstStrace(t *testing.T) {
	for _, kind := range []string{"tiers", "parts"} {
		t.Run(kind, func(t *testing.T) { againstStrace(t, kind == "parts") })
	}
}

func againstStrace(t *testing.T, divided bool) {
	need(t, "strace", "perl")
	s := newStore(t)
	programs, point := placement.NVM, ""
	if divided {
		s.onDisk()
		programs = placement.HDD
	}
	s.install(programs, "3", "/usr/bin/perl", "/bin/sh", "/bin/ls", "/bin/cat", "/usr/bin/sort")
	libs := strings.TrimSpace(run(t, "perl", "-MConfig", "-e", "print $Config{archlib}"))
	base := strings.TrimSpace(run(t, "perl", "-MPOSIX", "-e", `print $INC{"POSIX.pm"} =~ s,/POSIX.pm,,r`))
	require.DirExists(t, base)
	s.installDir(placement.HDD, "4", base)
	if _, err := os.Stat(libs); err == nil && libs != base {
		s.installDir(placement.HDD, "4", libs)
	}
	s.put(placement.HDD, "5", "etc/hosts", []byte("127.0.0.1 localhost\n"))
	if divided {
		point = s.divide("all", 16<<10)
	}
	tr := s.tracer(s.config())
	for _, script := range []string{
		`perl -MPOSIX -MSocket -MFile::Spec -MList::Util -e 'open(F,"<","/etc/hosts"); print <F>; system("/bin/ls /"); print join " ", sort keys %INC'`,
		`i=0; while [ $i -lt 50 ]; do /bin/cat /etc/hosts | /usr/bin/sort; i=$((i+1)); done; /bin/ls /etc`,
	} {
		c := s.container(map[bool]string{true: "7", false: "8"}[strings.HasPrefix(script, "perl")])
		c.Parts = point
		w := watch(t, tr, c)
		m := c.mount()
		require.NoError(t, os.Mkdir(filepath.Join(m, "dev"), 0o755))
		require.NoError(t, unix.Mknod(filepath.Join(m, "dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		log := filepath.Join(t.TempDir(), "strace")
		run(t, "env", "-i", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "strace", "-f", "-e", "trace=openat,open,execve,chroot", "-o", log, "chroot", m, "/bin/sh", "-c", script)
		got := ready(w)
		require.True(t, got.Complete)
		require.True(t, got.Executed())
		for _, f := range got.Files {
			require.Equal(t, divided && f.Size >= 16<<10, f.Parts, s.names[f.Ref])
		}
		data, err := os.ReadFile(log)
		require.NoError(t, err)
		_, inside, ok := strings.Cut(string(data), `chroot("`+m)
		require.True(t, ok)
		require.NotContains(t, inside, "<unfinished ...>\n+++", "strace lost a call")
		want := map[string]bool{}
		for _, line := range strings.Split(joined(inside), "\n") {
			var name string
			if f := opened.FindStringSubmatch(line); f != nil && !strings.Contains(f[2], "O_DIRECTORY") {
				name = f[1]
			} else if f := executed.FindStringSubmatch(line); f != nil {
				name = f[1]
			} else {
				continue
			}
			require.True(t, filepath.IsAbs(name), line)
			if st, err := os.Lstat(s.tree() + name); err == nil && st.Mode().IsRegular() && st.Size() > 0 {
				want[filepath.Clean(name)[1:]] = true
			}
		}
		require.Greater(t, len(want), 5)
		want["lib64/ld-linux-x86-64.so.2"] = true
		var list []string
		for p := range want {
			list = append(list, p)
		}
		sort.Strings(list)
		require.Equal(t, list, s.paths(got))
		t.Logf("%d files, the same by strace and by the trace", len(list))
	}
}

// joined puts the halves of calls together that strace shows interleaved.
func joined(s string) string {
	open := map[string]string{}
	var out []string
	for _, line := range strings.Split(s, "\n") {
		pid, rest, _ := strings.Cut(line, " ")
		if head, ok := strings.CutSuffix(rest, " <unfinished ...>"); ok {
			open[pid] = head
		} else if i := strings.Index(rest, " resumed>"); i >= 0 && open[pid] != "" {
			out = append(out, open[pid]+rest[i+len(" resumed>"):])
			delete(open, pid)
		} else {
			out = append(out, rest)
		}
	}
	return strings.Join(out, "\n")
}

func TestTouched(t *testing.T) {
	need(t, "mkfs.ext4", "mount", "dd")
	s := newStore(t)
	s.onDisk()
	const mb = 1 << 20
	for _, f := range []string{"small", "part", "evicted", "warm", "unread", "lib"} {
		size := 8 * mb
		if f == "small" {
			size = 100
		}
		data := slices.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
		if f == "lib" {
			copy(data, "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00")
		}
		s.put(placement.HDD, "3", f, data)
	}
	s.put(placement.NVM, "3", "memory", make([]byte, mb)) // tmpfs: always cached
	cfg := s.config()
	cfg.countSelf = true // this process is the container
	tr := s.tracer(cfg)
	for _, f := range []string{"small", "part", "evicted", "warm", "unread", "lib"} {
		fd, err := unix.Open(s.at(placement.HDD, f), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Fsync(fd))
		require.Eventually(t, func() bool { // pages under write-back stay at first
			require.NoError(t, unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED))
			in, _, err := cached(fd, 0, 0)
			require.NoError(t, err)
			return in == 0
		}, 10*time.Second, time.Millisecond)
		unix.Close(fd)
	}
	run(t, "cat", s.at(placement.HDD, "warm"))
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	read := func(f string, off, n int64) {
		fd, err := os.Open(filepath.Join(m, f))
		require.NoError(t, err)
		defer fd.Close()
		require.NoError(t, unix.Fadvise(int(fd.Fd()), 0, 0, unix.FADV_RANDOM)) // no read-ahead
		_, err = fd.ReadAt(make([]byte, n), off)
		require.NoError(t, err)
	}
	read("small", 0, 50)
	read("part", 0, 4096)
	read("part", 4*mb, 128<<10)
	read("evicted", 0, 4096)
	read("evicted", 4*mb, 128<<10)
	require.Eventually(t, func() bool { return w.Files() == 3 }, 10*time.Second, time.Millisecond) // what had been evicted at its first open is known
	pageOut(t, s.at(placement.HDD, "evicted"), 8*mb)
	read("warm", 0, 4096)
	read("unread", 0, 0)
	read("lib", 0, 4096)
	read("memory", 0, 4096)
	got := ready(w)
	by := s.byPath(got)
	require.EqualValues(t, 100, by["small"].Touched)
	require.EqualValues(t, 4096+128<<10, by["part"].Touched)
	require.Equal(t, []Range{{0, 4096}, {4 * mb, 128 << 10}}, by["part"].Ranges)
	require.EqualValues(t, by["part"].Touched, by["evicted"].Touched, "what was read and reclaimed again was read all the same")
	require.Equal(t, by["part"].Ranges, by["evicted"].Ranges)
	require.EqualValues(t, -1, by["warm"].Touched)
	require.EqualValues(t, 0, by["unread"].Touched)
	require.EqualValues(t, -1, by["memory"].Touched)
	require.Equal(t, Library, by["lib"].Kind, "by its ELF header")
	require.Equal(t, Read, by["part"].Kind)
}

// pageOut has the kernel reclaim what it has cached of a file, as it does where memory is short.
func pageOut(t *testing.T, path string, size int) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(m)) }()
	require.NoError(t, unix.Madvise(m, unix.MADV_RANDOM))
	page, sum := os.Getpagesize(), byte(0)
	require.Eventually(t, func() bool { // pages that were only just read stay at first
		for off := 0; off < size; off += page { // reclaimed is what is mapped
			if in, _, err := cached(int(f.Fd()), int64(off), int64(page)); err == nil && in > 0 {
				sum += m[off]
			}
		}
		require.NoError(t, unix.Madvise(m, unix.MADV_PAGEOUT))
		in, evicted, err := cached(int(f.Fd()), 0, 0)
		require.NoError(t, err)
		return in == 0 && evicted > 0
	}, 10*time.Second, time.Millisecond)
	runtime.KeepAlive(sum)
}

func TestJoin(t *testing.T) {
	var many []Range
	for i := range int64(1000) {
		many = append(many, Range{i * 3 * RangeGrain, RangeGrain})
	}
	many = append(many, Range{1 << 40, RangeGrain})
	first, last := many[0], many[1000]
	got := join(slices.Clone(many), 2)
	require.Len(t, got, 2)
	require.Equal(t, first.Offset, got[0].Offset)
	require.Equal(t, many[999].end(), got[0].end())
	require.Equal(t, last, got[1])
	require.Equal(t, many[:2], join(slices.Clone(many[:2]), 2))
}

// A kernel that refuses: one clear error, by which the daemon goes on without.
func TestRefused(t *testing.T) {
	need(t, "setpriv")
	if os.Getenv("HIF_REFUSED") != "" {
		_, err := New(Config{Root: "/"})
		if !errdefs.IsNotImplemented(err) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
			t.Fatalf("got %v", err)
		}
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, to take a capability away")
	}
	cmd := exec.Command("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", os.Args[0], "-test.run=^TestRefused$")
	cmd.Env = append(os.Environ(), "HIF_REFUSED=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func TestBadRoot(t *testing.T) {
	s := newStore(t)
	cfg := s.config()
	cfg.Root = filepath.Join(cfg.Root, "missing")
	_, err := New(cfg)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.False(t, errdefs.IsNotImplemented(err))
}

// Without room for descriptors events are lost; that must show.
func TestDescriptorsRunOut(t *testing.T) {
	if os.Getenv("HIF_NOFILE") == "" {
		s := newStore(t)
		_ = s // skips without root
		cmd := exec.Command(os.Args[0], "-test.run=^TestDescriptorsRunOut$")
		cmd.Env = append(os.Environ(), "HIF_NOFILE=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return
	}
	s := newStore(t)
	for i := range 30 {
		s.put(placement.HDD, "3", "f"+string(rune('a'+i)), []byte("x"))
	}
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	// The child is there before the limit is, and has its own.
	cmd := exec.Command("sh", "-c", "read x; cat "+m+"/f*")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	release := hold(t, tr)
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	free, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	unix.Close(free)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free) + 10, Max: old.Max}))
	_, err = in.Write([]byte("\n"))
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	release()
	got := ready(w)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old))
	require.False(t, got.Complete)
	require.NotZero(t, got.Lost)
	require.Less(t, len(got.Files), 30)
}

// BenchmarkOpen is what opening and closing a file costs a container: without a
// tracer, with one that watches no start, and with one that watches it. One file
// again and again is the worst case for the kernel's merging of events, files in
// turn that for the reader.
func BenchmarkOpen(b *testing.B) {
	for _, files := range []int{1, 1000} {
		for _, how := range []string{"none", "idle", "watched"} {
			b.Run(fmt.Sprintf("files=%d/%s", files, how), func(b *testing.B) {
				s := newStore(b)
				for i := range files {
					s.put(placement.HDD, "3", fmt.Sprint("f", i), []byte("x"))
				}
				c := s.container("7")
				tr := &Tracer{}
				if how != "none" {
					cfg := s.config()
					cfg.countSelf = true
					tr = s.tracer(cfg)
				}
				if how == "watched" {
					watch(b, tr, c)
				}
				m := c.mount()
				var names []string
				for i := range files {
					names = append(names, filepath.Join(m, fmt.Sprint("f", i)))
				}
				i := 0
				for b.Loop() {
					fd, err := unix.Open(names[i%files], unix.O_RDONLY|unix.O_CLOEXEC, 0)
					if err != nil {
						b.Fatal(err)
					}
					unix.Close(fd)
					i++
				}
				if st := tr.Stats(); how == "watched" {
					b.ReportMetric(float64(st.Events)/float64(b.N), "events/open")
				}
			})
		}
	}
}

// BenchmarkMemory reports what the tracer keeps for a file while a start is watched.
func BenchmarkMemory(b *testing.B) {
	s := newStore(b)
	const files = 5000
	for i := range files {
		s.put(placement.HDD, "3", fmt.Sprintf("usr/lib/python3/dist-packages/module/file%d.py", i), []byte("x"))
	}
	for b.Loop() {
		tr := s.tracer(s.config())
		c := s.container("7")
		w := watch(b, tr, c)
		m := c.mount()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		run(b, "sh", "-c", "cat "+m+"/usr/lib/python3/dist-packages/module/*.py")
		for tr.Stats().Opens[placement.HDD] < files {
			runtime.Gosched()
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/files, "bytes/file")
		ready(w)
		_ = unix.Unmount(m, 0)
	}
}
