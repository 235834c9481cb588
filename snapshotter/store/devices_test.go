// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// devices are the disks of a bench, which fail when they are told to. Their filesystems have no journal, which would make all
// of one read-only at the first error.
type devices struct {
	*bench
	hdd, nvm *hddsim.Disk
	pulling  atomic.Bool // what can wait waits
}

func (d *devices) Pulling() bool { return d.pulling.Load() }

func (d *devices) Starting() bool { return false }

func newDevices(t *testing.T) *devices {
	t.Helper()
	requireRoot(t)
	d := &devices{bench: &bench{t: t, dir: t.TempDir(), blobs: newBlobs(t)}}
	for _, disk := range []struct {
		name string
		is   **hddsim.Disk
	}{{"hdd", &d.hdd}, {"nvm", &d.nvm}} {
		started, err := hddsim.Start(t.Context(), hddsim.Options{
			Dir: filepath.Join(d.dir, "disk-"+disk.name), Size: 128 << 20, Model: &hddsim.Model{}, NoJournal: true,
		})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, started.Close()) })
		*disk.is = started
	}
	return d
}

func (d *devices) open(change func(*Config)) *Store {
	return d.bench.open(func(c *Config) {
		c.Root, c.NVMRoot = filepath.Join(d.hdd.Mountpoint(), "r"), filepath.Join(d.nvm.Mountpoint(), "n")
		c.State = filepath.Join(d.dir, "state")
		c.Traffic = d
		if change != nil {
			change(c)
		}
	})
}

// largeWrites are those of data: ext4 writes metadata in smaller requests.
func largeWrites(times int64) hddsim.Fault {
	return hddsim.Fault{Ops: hddsim.Writes, Least: 64 << 10, Times: times}
}

func (d *devices) fail(disk *hddsim.Disk, f hddsim.Fault) {
	d.t.Helper()
	require.NoError(d.t, disk.SetFault(f))
}

func (d *devices) struck(disk *hddsim.Disk) int64 {
	d.t.Helper()
	c, err := disk.Counters()
	require.NoError(d.t, err)
	return c.Struck
}

// uncache makes the kernel forget all files below the roots, so that they are read from the devices.
func (d *devices) uncache() {
	d.t.Helper()
	for _, disk := range []*hddsim.Disk{d.hdd, d.nvm} {
		require.NoError(d.t, filepath.WalkDir(disk.Mountpoint(), func(path string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			return drop(path)
		}))
	}
}

func drop(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// store unpacks a layer of one file, and of empty ones, and commits a snapshot of it.
func (d *devices) store(name string, to unpack.Placement, empty ...file) (Layer, []byte) {
	d.t.Helper()
	data := large(name, 1<<20)
	blob, diffID := layerOf(d.t, append([]file{{name, data}}, empty...)...)
	d.blobs.write(d.t, blob)
	l := d.begin(spec(blob, diffID, to))
	d.commit(name, "", l.ID)
	d.s.Release(l.ID)
	return l, data
}

// onDevice asserts that a file of a layer is read right from the devices.
func (d *devices) onDevice(name string, data []byte) {
	d.t.Helper()
	var id string
	entries, err := d.s.Entries(d.t.Context())
	require.NoError(d.t, err)
	for _, e := range entries {
		if e.Info.Name == name {
			id = e.ID
		}
	}
	view, err := d.s.View(d.t.Context(), id, name)
	require.NoError(d.t, err)
	d.uncache()
	d.read(view, func(root string) {
		got, err := os.ReadFile(filepath.Join(root, name))
		require.NoError(d.t, err)
		require.True(d.t, bytes.Equal(data, got), "%s is not what was unpacked", name)
	})
}
