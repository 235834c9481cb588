// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Counters are what the kernel counts for a block device (Documentation/block/stat.rst).
type Counters struct {
	Reads        int64 `json:"reads"`
	ReadBytes    int64 `json:"read_bytes"`
	Writes       int64 `json:"writes"`
	WrittenBytes int64 `json:"written_bytes"`
	Flushes      int64 `json:"flushes"`
	// BusyMS is the time in which the device had something to do.
	BusyMS int64 `json:"busy_ms"`
}

func (c Counters) Minus(o Counters) Counters {
	return Counters{
		c.Reads - o.Reads, c.ReadBytes - o.ReadBytes, c.Writes - o.Writes, c.WrittenBytes - o.WrittenBytes,
		c.Flushes - o.Flushes, c.BusyMS - o.BusyMS,
	}
}

// CountersOf reads those of the device that the filesystem of a directory stands on.
func CountersOf(dir string) (Counters, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return Counters{}, fmt.Errorf("find device of %q: %w", dir, err)
	}
	path := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	b, err := os.ReadFile(path)
	if err != nil {
		return Counters{}, fmt.Errorf("read counters of device: %w", err)
	}
	var n [17]int64
	words := strings.Fields(string(b))
	if len(words) < len(n) {
		return Counters{}, fmt.Errorf("%s: %d fields, want %d", path, len(words), len(n))
	}
	for i := range n {
		if n[i], err = strconv.ParseInt(words[i], 10, 64); err != nil {
			return Counters{}, fmt.Errorf("%s: %w", path, err)
		}
	}
	return Counters{n[0], n[2] * 512, n[4], n[6] * 512, n[15], n[9]}, nil
}

// UsedBytes is what is taken of the filesystem of a directory.
func UsedBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("ask for the space of %q: %w", dir, err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// FileBytes adds up the sizes of the regular files below a directory, of files with several names once.
func FileBytes(dir string) (sum int64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			sum += st.Size
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return sum, err
}

// CachedShare is what share of the bytes of some files, without holes, is in the page cache.
func CachedShare(paths []string) (float64, error) {
	var held, cached int64
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		var st unix.Stat_t
		var c unix.Cachestat_t
		err = errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0), f.Close())
		if err != nil {
			return 0, fmt.Errorf("ask what is cached of %q: %w", path, err)
		}
		held, cached = held+st.Blocks*512, cached+int64(c.Cache)*int64(os.Getpagesize())
	}
	return float64(cached) / float64(max(held, 1)), nil
}

// SyncFS brings what is dirty on the filesystem of a directory to its device.
func SyncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync the filesystem of %q: %w", dir, err)
	}
	return nil
}

// DropCaches empties the page cache and the caches of inodes and names of the machine, unless really is false: a benchmark that
// is only tried leaves those of others alone.
func DropCaches(really bool) error {
	if !really {
		return nil
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o644); err != nil {
		return fmt.Errorf("drop caches: %w", err)
	}
	return nil
}

// Memory is what a process occupies.
type Memory struct {
	RSS  int64 `json:"rss_bytes"`
	Peak int64 `json:"peak_rss_bytes"`
}

func MemoryOf(pid int) (m Memory, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, fmt.Errorf("read memory of process: %w", err)
	}
	for line := range bytes.Lines(b) {
		var kib int64
		if n, _ := fmt.Sscanf(string(line), "VmRSS: %d kB", &kib); n == 1 {
			m.RSS = kib << 10
		}
		if n, _ := fmt.Sscanf(string(line), "VmHWM: %d kB", &kib); n == 1 {
			m.Peak = kib << 10
		}
	}
	if m.RSS == 0 {
		return m, fmt.Errorf("process %d has no VmRSS", pid)
	}
	return m, nil
}

// clockTick is USER_HZ, 100 a second on all architectures that Go runs on.
const clockTick = 10 * time.Millisecond

// Scheduled is how long the threads of a process have run, and how long they waited for a processor while they could have run.
func Scheduled(pid int) (ran, waited time.Duration, err error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err == nil && len(threads) == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read how process %d was scheduled: %w", pid, err)
	}
	for _, t := range threads {
		b, err := os.ReadFile(t)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended meanwhile
		}
		var r, w int64
		if err == nil {
			// Documentation/scheduler/sched-stats.rst: nanoseconds on a processor and in a queue for one.
			_, err = fmt.Sscan(string(b), &r, &w)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("read how process %d was scheduled: %w", pid, err)
		}
		ran, waited = ran+time.Duration(r), waited+time.Duration(w)
	}
	return ran, waited, nil
}

// CPUOf is the processor time that a process has used, all its threads and all children that it has waited for.
func CPUOf(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read CPU time of process: %w", err)
	}
	// The name, in parentheses, may hold anything. utime, stime, cutime and cstime are fields 14 to 17 of
	// proc_pid_stat(5).
	words := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(words) < 15 {
		return 0, fmt.Errorf("process %d: %d fields in stat", pid, len(words))
	}
	var ticks int64
	for _, w := range words[11:15] {
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("process %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}
