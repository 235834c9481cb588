// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestModelOfHead(t *testing.T) {
	t0 := time.Unix(1000, 0)
	model := Model{
		ReadSeek: 8 * time.Millisecond, WriteSeek: 4 * time.Millisecond, Flush: 10 * time.Millisecond,
		ReadRate: 1e6, WriteRate: 500e3, Gap: 10_000,
	}
	type step struct {
		name   string
		op     string
		at     time.Duration // of arrival
		off, n int64
		want   time.Duration // of completion
	}
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"sequential reads cost the transfer alone", []step{
			{"first, at the head", "r", 0, 0, 1000, 1 * time.Millisecond},
			{"next, queued", "r", 0, 1000, 2000, 3 * time.Millisecond},
			{"after a pause within the track buffer", "r", 10 * time.Millisecond, 3000, 1000, 4 * time.Millisecond},
			{"after a long pause", "r", 100 * time.Millisecond, 4000, 1000, 101 * time.Millisecond},
		}},
		{"seeks", []step{
			{"far", "r", 0, 1 << 20, 1000, 9 * time.Millisecond},
			{"back", "r", 0, 0, 1000, 18 * time.Millisecond},
			{"a gap is passed over", "r", 18 * time.Millisecond, 11_000, 1000, 29 * time.Millisecond},
			{"a byte more is a seek", "r", 29 * time.Millisecond, 22_001, 1000, 38 * time.Millisecond},
			{"a seek has no track buffer", "r", 50 * time.Millisecond, 0, 1000, 59 * time.Millisecond},
		}},
		{"writes and flushes", []step{
			{"nothing to flush", "f", 0, 0, 0, 0},
			{"write far", "w", 0, 1 << 20, 1000, 6 * time.Millisecond},
			{"flush waits for the write", "f", time.Millisecond, 0, 0, 16 * time.Millisecond},
			{"nothing new to flush", "f", 20 * time.Millisecond, 0, 0, 20 * time.Millisecond},
			{"one actuator for reads and writes", "w", 20 * time.Millisecond, 0, 500, 25 * time.Millisecond},
			{"", "r", 20 * time.Millisecond, 1 << 20, 1000, 34 * time.Millisecond},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := &head{model: model, busy: t0}
			for _, s := range test.steps {
				var done time.Time
				switch now := t0.Add(s.at); s.op {
				case "r":
					done = h.read(now, s.off, s.n)
				case "w":
					done = h.write(now, s.off, s.n)
				case "f":
					done = h.flush(now)
				}
				require.Equal(t, s.want, done.Sub(t0), "%s at %d", s.name, s.off)
			}
		})
	}
	free := &head{}
	require.Equal(t, t0, free.read(t0, 1<<30, 1<<20), "the zero model costs nothing")
}

func start(t *testing.T, o Options) *Disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	o.Dir, o.Size = filepath.Join(t.TempDir(), "disk"), 32<<20
	d, err := Start(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, d.Close())
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(o.Dir))
		require.NoError(t, err)
		require.Empty(t, mounts)
		require.NoDirExists(t, o.Dir)
	})
	return d
}

func TestDiskCountsWhatReachesIt(t *testing.T) {
	d := start(t, Options{Model: &Model{}})
	dio, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Device()), "loop/dio"))
	require.NoError(t, err)
	require.Equal(t, "1", strings.TrimSpace(string(dio)), "the disk's file must not be cached a second time")

	path := filepath.Join(d.Mountpoint(), "f")
	data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	before, err := d.Counters()
	require.NoError(t, err)
	writeSync(t, path, data)
	after, err := d.Counters()
	require.NoError(t, err)
	require.GreaterOrEqual(t, after.WrittenBytes-before.WrittenBytes, int64(len(data)))
	require.Greater(t, after.Flushes, before.Flushes)

	// What is cached is not read from the disk; what is dropped is, once.
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, data, got)
	cached, err := d.Counters()
	require.NoError(t, err)
	require.Equal(t, after.Reads, cached.Reads)

	dropCache(t, path)
	got, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, data, got)
	cold, err := d.Counters()
	require.NoError(t, err)
	require.GreaterOrEqual(t, cold.ReadBytes-cached.ReadBytes, int64(len(data)))
	// Read-ahead is at work: not one request a page.
	require.LessOrEqual(t, cold.Reads-cached.Reads, int64(len(data)/(16<<10)))
}

func TestModelCanBeChangedWhileRunning(t *testing.T) {
	d := start(t, Options{Model: &Model{}})
	path := filepath.Join(d.Mountpoint(), "f")
	writeSync(t, path, make([]byte, 4096))
	dropCache(t, path)
	require.NoError(t, d.SetModel(Model{ReadSeek: 100 * time.Millisecond}))
	begin := time.Now()
	_, err := os.ReadFile(path)
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(begin), 100*time.Millisecond, "a lower bound only: load makes it longer")
	require.NoError(t, d.SetModel(Model{}))

	bad, err := os.OpenFile(filepath.Join(d.fuseDir(), modelName), os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = bad.WriteString("nonsense")
	require.ErrorIs(t, err, unix.EINVAL)
	require.NoError(t, bad.Close())
}

func TestPowerCutLosesWhatWasNotFlushed(t *testing.T) {
	d := start(t, Options{Model: &Model{}, Volatile: true})
	mnt := d.Mountpoint()
	writeSync(t, filepath.Join(mnt, "kept"), []byte("kept"))
	syncDir(t, mnt)

	// In the page cache, on its way to the disk, but not flushed.
	f, err := os.Create(filepath.Join(mnt, "lost"))
	require.NoError(t, err)
	data := bytes.Repeat([]byte("x"), 1<<20)
	_, err = f.Write(data)
	require.NoError(t, err)
	require.NoError(t, unix.SyncFileRange(int(f.Fd()), 0, int64(len(data)),
		unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER))
	c, err := d.Counters()
	require.NoError(t, err)
	require.GreaterOrEqual(t, c.Volatile, int64(len(data)/blockSize), "written, not flushed")
	require.NoError(t, f.Close())
	// Renamed without a sync of the directory.
	require.NoError(t, os.Rename(filepath.Join(mnt, "kept"), filepath.Join(mnt, "renamed")))

	require.NoError(t, d.PowerCut())
	require.NoFileExists(t, filepath.Join(mnt, "kept"), "nothing is mounted")
	require.NoError(t, d.PowerOn(t.Context()))

	got, err := os.ReadFile(filepath.Join(mnt, "kept"))
	require.NoError(t, err, "the rename was never made durable")
	require.Equal(t, "kept", string(got))
	lost, err := os.ReadFile(filepath.Join(mnt, "lost"))
	require.True(t, os.IsNotExist(err) || len(lost) == 0, "%d bytes of an unflushed file: %v", len(lost), err)
}

func TestCloseWhileBusyAndTwice(t *testing.T) {
	d := start(t, Options{Model: &Model{}})
	f, err := os.Create(filepath.Join(d.Mountpoint(), "open"))
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- d.Close() }()
	// The mount goes first, lazily; the server ends when the file is closed.
	require.Eventually(t, func() bool {
		mounted, err := mountinfo.Mounted(d.Mountpoint())
		return err == nil && !mounted || os.IsNotExist(err)
	}, 20*time.Second, time.Millisecond)
	require.NoError(t, f.Close())
	require.NoError(t, <-done)
}

func TestServerGoesWithItsStarter(t *testing.T) {
	d := start(t, Options{Model: &Model{}})
	require.NoError(t, d.stdin.Close()) // what the kernel does when this process dies
	<-d.exited
	mounted, err := mountinfo.Mounted(d.Mountpoint())
	require.NoError(t, err)
	require.False(t, mounted)
}

func TestStartRefusesARelativeDirectory(t *testing.T) {
	_, err := Start(t.Context(), Options{Dir: "relative"})
	require.ErrorContains(t, err, "relative")
}

func writeSync(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	_, err = f.Write(data)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
}

func syncDir(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
}

// dropCache makes the kernel forget one file, not those of everybody on the machine.
func dropCache(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	require.NoError(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	require.NoError(t, f.Close())
}
