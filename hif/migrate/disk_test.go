// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestListening(t *testing.T) {
	at := time.Unix(1000, 0)
	busy := time.Duration(0)
	d := &disk{limit: 0.3}
	hear := func(after, used time.Duration) time.Duration {
		at, busy = at.Add(after), busy+used
		return d.hear(sample{at, busy})
	}
	require.Equal(t, listenFor, hear(0, 0), "it begins to listen")
	require.Equal(t, 60*time.Millisecond, hear(40*time.Millisecond, 0), "woken early")
	require.Zero(t, hear(60*time.Millisecond, 30*time.Millisecond), "others may have 30 %")
	require.Equal(t, at.Add(listenEvery), d.next)
	require.Equal(t, listenFor, hear(time.Second, time.Second), "what happens while it works is not counted")
	require.Equal(t, listenBusy, hear(100*time.Millisecond, 40*time.Millisecond), "too much: it listens on")
	require.True(t, d.busy)
	require.Equal(t, listenBusy, hear(time.Second, 200*time.Millisecond), "not yet little enough")
	require.InDelta(t, 0.2, d.share, 0.001)
	require.Zero(t, hear(time.Second, 100*time.Millisecond))
	require.False(t, d.busy)
	require.Equal(t, listenFor, hear(time.Second, 0))
	require.Equal(t, listenBusy, hear(100*time.Millisecond, 10*time.Second), "a long request is counted when it ends")
	require.InDelta(t, 1, d.share, 0)
}

// The counters of a real device rise with what others do on it.
func TestDeviceOfTheDisk(t *testing.T) {
	require.Empty(t, statFile("/proc"), "no device")
	require.Empty(t, statFile("/nowhere"))
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	require.NoError(t, os.Mkdir(mnt, 0o755))
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 64<<20))
	command(t, "mkfs.ext4", "-q", image)
	command(t, "mount", "-o", "loop", image, mnt)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(mnt, unix.MNT_DETACH)) })
	file := statFile(mnt)
	require.NotEmpty(t, file)
	before, err := readBusy(file)
	require.NoError(t, err)
	piece := bytes.Repeat([]byte{1}, 4<<20)
	require.Eventually(t, func() bool {
		f, err := os.Create(filepath.Join(mnt, "f"))
		require.NoError(t, err)
		defer f.Close()
		_, err = f.Write(piece)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		after, err := readBusy(file)
		require.NoError(t, err)
		return after > before
	}, 10*time.Second, time.Millisecond)

	short := filepath.Join(dir, "stat")
	require.NoError(t, os.WriteFile(short, []byte("1 2 3\n"), 0o600))
	_, err = readBusy(short)
	require.Error(t, err)
}

// While others have the disk the engine waits and says for what.
func TestWaitsForTheDisk(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	stat := filepath.Join(t.TempDir(), "stat")
	set := func(ms string) {
		tmp := stat + ".new"
		require.NoError(t, os.WriteFile(tmp, []byte("0 0 0 0 0 0 0 0 0 "+ms+" 0\n"), 0o600))
		require.NoError(t, os.Rename(tmp, stat))
	}
	set("0")
	e := r.engine(Config{Disk: 0.3})
	waitState(t, e, Idle)
	e.disk.stat = stat // before a goal its goroutine does not look
	// Whenever the engine looks, others have been at it since its last look.
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for ms := 1_000_000; ; ms += 1_000_000 {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				set(strconv.Itoa(ms))
			}
		}
	}()
	e.Apply(p)
	waitState(t, e, Waiting)
	require.Contains(t, e.Progress().Reason, "others keep the HDD busy")
	close(stop)
	<-stopped
	r.reaches(e, want)
	require.Positive(t, e.Stats().Waited["disk"])
}
