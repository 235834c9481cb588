// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestBreaker(t *testing.T) {
	for name, c := range map[string]struct {
		fault Fault
		want  string // of ten requests, which are struck
	}{
		"none":        {Fault{}, ".........."},
		"all writes":  {Fault{Ops: Writes}, ".x..x..x.."},
		"once":        {Fault{Ops: Writes, Times: 1}, ".x........"},
		"the second":  {Fault{Ops: Writes, Skip: 1, Times: 1}, "....x....."},
		"from there":  {Fault{Ops: Writes, Skip: 1}, "....x..x.."},
		"large":       {Fault{Ops: Reads + Writes, Least: 100}, "......xx.x"},
		"flushes":     {Fault{Ops: Flushes}, "..x..x..x."},
		"any":         {Fault{Ops: Reads + Writes + Flushes, Skip: 8}, "........xx"},
		"flush, size": {Fault{Ops: Flushes, Least: 100, Times: 1}, "..x......."},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBreaker()
			require.NoError(t, b.set(c.fault))
			got, struck := "", int64(0)
			for i := range 10 {
				if b.pass(t.Context(), []string{Reads, Writes, Flushes}[i%3], int64(16*i+4)) != 0 {
					got += "x"
					struck++
				} else {
					got += "."
				}
			}
			require.Equal(t, c.want, got)
			_, n := b.get()
			require.Equal(t, struck, n)
		})
	}
	b := newBreaker()
	require.Error(t, b.set(Fault{Ops: "x"}))
	require.Error(t, b.set(Fault{Ops: Reads, Skip: -1}))
	require.NoError(t, b.set(Fault{Ops: Reads, Hold: true}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Equal(t, unix.EINTR, b.pass(ctx, Reads, 1))
	passed := make(chan error, 1)
	go func() { passed <- errOf(b.pass(t.Context(), Reads, 1)) }()
	require.NoError(t, b.set(Fault{}))
	require.NoError(t, <-passed)
}

func errOf(e unix.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

func TestDeviceThatFails(t *testing.T) {
	d := start(t, Options{Model: &Model{}, NoJournal: true})
	path := filepath.Join(d.Mountpoint(), "f")
	data := bytes.Repeat([]byte("x"), 1<<20)
	writeSync(t, path, data)

	// A write that failed is told of by the sync, once.
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, d.SetFault(Fault{Ops: Writes, Least: 64 << 10, Times: 1}))
	_, err = f.WriteAt(bytes.Repeat([]byte("y"), 1<<20), 0)
	require.NoError(t, err)
	require.ErrorIs(t, f.Sync(), unix.EIO)
	require.NoError(t, f.Sync())
	c, err := d.Counters()
	require.NoError(t, err)
	require.EqualValues(t, 1, c.Struck)
	dropCache(t, path)
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NotEqual(t, bytes.Repeat([]byte("y"), 1<<20), got, "it was lost")

	// A flush that failed.
	require.NoError(t, d.SetFault(Fault{Ops: Flushes, Times: 1}))
	_, err = f.WriteAt([]byte("z"), 0)
	require.NoError(t, err)
	require.ErrorIs(t, f.Sync(), unix.EIO)
	require.NoError(t, f.Sync())

	// A read that fails, for ever and then no more.
	dropCache(t, path)
	require.NoError(t, d.SetFault(Fault{Ops: Reads}))
	for range 2 {
		_, err = os.ReadFile(path)
		require.ErrorIs(t, err, unix.EIO)
	}
	require.NoError(t, d.SetFault(Fault{}))
	got, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Len(t, got, 1<<20)
}

func TestFlushThatIsHeld(t *testing.T) {
	d := start(t, Options{Model: &Model{}, Volatile: true})
	require.NoError(t, d.SetFault(Fault{Ops: Flushes, Hold: true}))
	f, err := os.Create(filepath.Join(d.Mountpoint(), "f"))
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteString("data")
	require.NoError(t, err)
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }()
	require.Eventually(t, func() bool {
		c, err := d.Counters()
		return err == nil && c.Struck > 0
	}, 20*time.Second, time.Millisecond)
	select {
	case err := <-synced:
		require.Fail(t, "the sync has ended", "%v", err)
	default:
	}
	require.NoError(t, d.SetFault(Fault{}))
	require.NoError(t, <-synced)
}

// A disk writes by itself what it likes, in any order, before the power goes.
func TestPowerCutKeepsAShare(t *testing.T) {
	const blocks = 256
	kept := func(t *testing.T, k Keep) (sum int) {
		t.Helper()
		d := start(t, Options{Model: &Model{}, Volatile: true})
		path := filepath.Join(d.Mountpoint(), "f")
		writeSync(t, path, make([]byte, blocks*blockSize))
		syncDir(t, d.Mountpoint())
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		_, err = f.Write(bytes.Repeat([]byte("x"), blocks*blockSize))
		require.NoError(t, err)
		require.NoError(t, unix.SyncFileRange(int(f.Fd()), 0, blocks*blockSize,
			unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER))
		require.NoError(t, f.Close())
		require.NoError(t, d.Persist(k))
		require.NoError(t, d.PowerCut())
		require.NoError(t, d.PowerOn(t.Context()))
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		for b := range blocks {
			if got[b*blockSize] == 'x' {
				sum++
			}
		}
		return sum
	}
	for _, k := range []Keep{{0, 1}, {0.5, 1}, {1, 1}} {
		t.Run(fmt.Sprint(k.Share), func(t *testing.T) {
			n := kept(t, k)
			switch k.Share {
			case 0:
				require.Zero(t, n)
			case 1:
				require.Equal(t, blocks, n)
			default:
				require.InDelta(t, blocks/2, n, blocks/4, "the seed is fixed")
			}
		})
	}
}
