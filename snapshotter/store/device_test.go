// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// The kernel tells of a write that failed once for each descriptor. Of syncs at the same time none may take a torn pack for
// whole because another one was told.
func TestSyncErrorOfAPack(t *testing.T) {
	for name, fault := range map[string]hddsim.Fault{
		"write": largeWrites(1), "flush": {Ops: hddsim.Flushes, Times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices(t)
			d.pulling.Store(true)
			s := d.open(nil)
			if name == "write" {
				d.fail(d.hdd, fault)
			}
			torn, tornData := d.store("torn", unpack.ToPack)
			if name == "write" { // the flusher meets it, or the sync
				d.eventually("the disk has failed", func() bool { return d.struck(d.hdd) > 0 || s.Backlog() == 0 })
			}
			good, goodData := d.store("good", unpack.ToPack)
			if name == "flush" {
				d.fail(d.hdd, fault)
			}
			var all sync.WaitGroup
			errs := make([]error, 8)
			for i := range errs {
				all.Go(func() { errs[i] = s.sync(t.Context()) })
			}
			all.Wait()
			for _, err := range errs {
				require.NoError(t, err)
			}
			require.EqualValues(t, 1, d.struck(d.hdd))
			require.Zero(t, d.state(good.ID, Home).Repairs)
			d.eventually("the torn one is unpacked anew", func() bool {
				l, err := s.Layer(torn.ID)
				return err == nil && l.Repairs == 1 && l.Damaged == ""
			})
			d.pulling.Store(false)
			s.TrafficChanged()
			d.state(torn.ID, Home)
			d.onDevice("torn", tornData)
			d.onDevice("good", goodData)
		})
	}
}

// An error of NVM concerns the layers with files there, and no others.
func TestSyncErrorOfNVM(t *testing.T) {
	d := newDevices(t)
	d.pulling.Store(true)
	s := d.open(nil)
	d.fail(d.nvm, largeWrites(0))
	fast, fastData := d.store("fast", unpack.ToNVM)
	slow, slowData := d.store("slow", unpack.ToPack)
	d.pulling.Store(false)
	s.TrafficChanged()
	require.Zero(t, d.state(slow.ID, Home).Repairs)
	d.eventually("the torn layer is unpacked anew", func() bool {
		l, err := s.Layer(fast.ID)
		return err == nil && l.Repairs >= 1
	})
	require.Positive(t, d.struck(d.nvm))
	d.fail(d.nvm, hddsim.Fault{})
	d.state(fast.ID, Home)
	d.onDevice("fast", fastData)
	d.onDevice("slow", slowData)
}

// The sync of one layer is told of errors of all that stands on NVM, so also of what is still being unpacked or packed.
func TestSyncErrorOfNVMWhileOthersAreWritten(t *testing.T) {
	t.Run("unpacking", func(t *testing.T) {
		d := newDevices(t)
		d.pulling.Store(true)
		s := d.open(nil)
		d.fail(d.nvm, largeWrites(0))
		data := large("later", 200_000) // stays cached
		blob, diffID := layerOf(t, file{"later", data}, file{"last", large("last", 2<<20)})
		sp := spec(blob, diffID, unpack.ToNVM)
		reached := make(chan struct{}, 10)
		sp.Place = func(f unpack.File) unpack.Placement { reached <- struct{}{}; return unpack.ToNVM }
		later, _, err := s.Begin(t.Context(), sp)
		require.NoError(t, err)
		w, err := d.blobs.Writer(t.Context(), content.WithRef("default/1/layer-"+sp.Blob.String()), content.WithDescriptor(desc(blob)))
		require.NoError(t, err)
		half := len(blob) / 2 // within the second file
		_, err = w.Write(blob[:half])
		require.NoError(t, err)
		<-reached
		<-reached
		first, _ := d.store("first", unpack.ToNVM)
		require.NoError(t, s.sync(t.Context()))
		require.Positive(t, d.struck(d.nvm))
		d.fail(d.nvm, hddsim.Fault{})
		_, err = w.Write(blob[half:])
		require.NoError(t, err)
		require.NoError(t, w.Commit(t.Context(), sp.Size, sp.Blob))
		_, err = s.Await(t.Context(), later)
		require.NoError(t, err)
		d.commit("later", "", later)
		s.Release(later)
		d.pulling.Store(false)
		s.TrafficChanged()
		d.state(first.ID, Home)
		l := d.state(later, Home)
		require.Equal(t, 1, l.Repairs, "what was written while NVM failed is not trusted")
		d.onDevice("later", data)
	})
	t.Run("committed by path", func(t *testing.T) {
		d := newDevices(t)
		d.pulling.Store(true)
		s := d.open(nil)
		first, _ := d.store("first", unpack.ToNVM)
		d.fail(d.nvm, largeWrites(0)) // the kernel may write at any time
		d.stage("work", "", placement.NVM, func(dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "new"), large("new", 1<<20), 0o640))
		})
		// It is committed, and its packing waits for the layer's turn.
		layer := d.commitPath("work", "top")
		require.Equal(t, Stored, d.state(layer, Stored).State)
		require.NoError(t, s.sync(t.Context()))
		d.fail(d.nvm, hddsim.Fault{})
		d.eventually("it is refused: there is no blob to unpack anew", func() bool {
			l, err := s.Layer(layer)
			return err == nil && l.Damaged != ""
		})
		_, err := s.Await(t.Context(), layer)
		require.True(t, errdefs.IsDataLoss(err), err)
		require.ErrorContains(t, err, "reported an error while it was written")
		d.pulling.Store(false)
		s.TrafficChanged()
		d.state(first.ID, Home)
	})
}

// The disk fails while holes are filled. The good copy on NVM stays, and the pack becomes whole later.
func TestHolesAreFilledInSpiteOfErrors(t *testing.T) {
	for name, fault := range map[string]hddsim.Fault{
		"write": largeWrites(0), "flush": {Ops: hddsim.Flushes},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices(t)
			s := d.open(func(c *Config) { c.WriteBack = false })
			l, data := d.store("a", unpack.ToNVM)
			d.state(l.ID, Durable)
			d.fail(d.hdd, fault) // until the error has been seen, however often the store tries again meanwhile
			err := s.AwaitHome(t.Context(), l.ID)
			require.ErrorIs(t, err, unix.EIO)
			require.Positive(t, d.struck(d.hdd))
			now, err := s.Layer(l.ID)
			require.NoError(t, err)
			require.Equal(t, Durable, now.State)
			require.Empty(t, now.Damaged)
			ref := pack.Ref{Layer: uint64(l.ID), Number: 1}
			require.EqualValues(t, 1<<20, s.OnNVM(ref), "the good copy stays")
			_, _, err = s.Demote(ref.Redirect(), nil)
			require.True(t, errdefs.IsFailedPrecondition(err), err)

			d.fail(d.hdd, hddsim.Fault{})
			d.eventually("the pack is whole", func() bool { return s.AwaitHome(t.Context(), l.ID) == nil })
			_, _, err = s.Demote(ref.Redirect(), nil)
			require.NoError(t, err)
			d.onDevice("a", data)
			now, err = s.Layer(l.ID)
			require.NoError(t, err)
			require.Zero(t, now.Repairs)
		})
	}
}

// A disk that cannot be read for a while costs no layer, though its blob is gone.
func TestPackThatCannotBeReadForAWhile(t *testing.T) {
	d := newDevices(t)
	s := d.open(nil)
	l, data := d.store("a", unpack.ToPack)
	d.state(l.ID, Home)
	require.NoError(t, d.blobs.Delete(t.Context(), l.Blob))
	d.eventually("the copy of the database is written", func() bool { return s.FlushDatabase(t.Context()) == nil })

	entries, err := s.Entries(t.Context())
	require.NoError(t, err)
	d.idle()
	for range 2 {
		d.uncache()
		d.fail(d.hdd, hddsim.Fault{Ops: hddsim.Reads})
		_, err = s.View(t.Context(), entries[0].ID, "a")
		require.ErrorIs(t, err, unix.EIO)
		s.exec.kick(l.ID) // as after a start
		d.idle()
		now, err := s.Layer(l.ID)
		require.NoError(t, err)
		require.Empty(t, now.Damaged)
	}
	require.Positive(t, d.struck(d.hdd))
	d.fail(d.hdd, hddsim.Fault{})
	d.onDevice("a", data)
}

// A view that the device has lost is made again, once it is looked at.
func TestViewsOnADeviceThatFails(t *testing.T) {
	d := newDevices(t)
	s := d.open(nil)
	var many []file // so that the view is written in large requests
	for i := range 3000 {
		many = append(many, file{fmt.Sprintf("empty-%d", i), []byte{}})
	}
	l, data := d.store("a", unpack.ToPack, many...)
	d.state(l.ID, Home)
	entries, err := s.Entries(t.Context())
	require.NoError(t, err)
	d.fail(d.nvm, largeWrites(0))
	point, err := s.View(t.Context(), entries[0].ID, "a")
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, unix.Unmount(point, 0))
	root, err := os.Open(d.nvm.Mountpoint())
	require.NoError(t, err)
	require.ErrorIs(t, unix.Syncfs(int(root.Fd())), unix.EIO)
	require.NoError(t, root.Close())
	require.Positive(t, d.struck(d.nvm))
	d.fail(d.nvm, hddsim.Fault{})
	d.uncache()

	d.open(nil)
	require.Zero(t, d.state(l.ID, Home).Repairs)
	d.onDevice("a", data)
}

// What fails while a layer is unpacked fails for who asked for it, and the same unpacking succeeds when the device is well.
func TestUnpackingOnADeviceThatFails(t *testing.T) {
	for name, c := range map[string]struct {
		disk func(*devices) *hddsim.Disk
		to   unpack.Placement
	}{
		"pack on the HDD": {func(d *devices) *hddsim.Disk { return d.hdd }, unpack.ToPack},
		"files on NVM":    {func(d *devices) *hddsim.Disk { return d.nvm }, unpack.ToNVM},
		"files on both":   {func(d *devices) *hddsim.Disk { return d.nvm }, unpack.ToBoth},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices(t)
			d.open(nil)
			d.fail(c.disk(d), largeWrites(0)) // for ever
			l, data := d.store("a", c.to)
			d.eventually("it is tried again, and then left to who needs it", func() bool {
				l, err := d.s.Layer(l.ID)
				// Unpacked anew all of it goes to the pack.
				return err == nil && (l.Repairs == mostRepairs && l.Damaged != "" || c.to != unpack.ToPack && l.State == Home && l.Damaged == "")
			})
			require.Positive(t, d.struck(c.disk(d)))
			d.fail(c.disk(d), hddsim.Fault{})
			_, err := d.s.Await(t.Context(), l.ID)
			require.NoError(t, err)
			d.state(l.ID, Home)
			d.onDevice("a", data)
		})
	}
}

// The daemon that was told of an error is killed before it could record it. The next one is told of nothing.
func TestSyncErrorThatAKilledDaemonWasTold(t *testing.T) {
	for name, c := range map[string]struct {
		disk func(*devices) *hddsim.Disk
		to   unpack.Placement
	}{
		"pack":         {func(d *devices) *hddsim.Disk { return d.hdd }, unpack.ToPack},
		"files on NVM": {func(d *devices) *hddsim.Disk { return d.nvm }, unpack.ToBoth},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices(t)
			d.pulling.Store(true)
			s := d.open(nil)
			d.fail(c.disk(d), largeWrites(0))
			l, data := d.store("a", c.to)
			root, err := os.Open(c.disk(d).Mountpoint())
			require.NoError(t, err)
			require.ErrorIs(t, unix.Syncfs(int(root.Fd())), unix.EIO)
			require.NoError(t, root.Close())
			require.Positive(t, d.struck(c.disk(d)))
			d.fail(c.disk(d), hddsim.Fault{})
			// What a killed daemon takes along: it has no descriptor any more, and has marked nothing.
			f := s.takePack(l.ID)
			_ = s.flusher.finish(f)
			require.NoError(t, f.Close())
			for _, pin := range []placement.Tier{placement.NVM, placement.HDD} {
				_ = s.Tiers.Sync(pin)
			}
			d.pulling.Store(false)
			s.TrafficChanged()
			require.Equal(t, 1, d.state(l.ID, Home).Repairs)
			d.onDevice("a", data)
		})
	}
}

// A write of the database fails. What was committed before and after stands on the device.
func TestDatabaseOnADeviceThatFails(t *testing.T) {
	for name, fault := range map[string]hddsim.Fault{
		"writes": {Ops: hddsim.Writes}, "flushes": {Ops: hddsim.Flushes},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevices(t)
			s := d.open(nil)
			put := func(from, to int) (err error) {
				for i := from; i < to && err == nil; i++ {
					err = s.UpdateTx(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
						return own(tx, BucketOrigins).Put(fmt.Appendf(nil, "key-%04d", i), large(fmt.Sprint(i), 3000))
					})
				}
				return err
			}
			require.NoError(t, put(0, 50))
			d.fail(d.nvm, fault)
			require.ErrorIs(t, put(50, 51), unix.EIO)
			require.ErrorIs(t, put(50, 51), unix.EIO)
			d.fail(d.nvm, hddsim.Fault{})
			require.NoError(t, put(51, 150))
			require.NoError(t, s.Close())
			d.uncache()
			s = d.open(nil)
			require.NoError(t, s.ViewTx(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
				for i := range 150 {
					got := own(tx, BucketOrigins).Get(fmt.Appendf(nil, "key-%04d", i))
					if i != 50 || got != nil {
						require.Equal(t, large(fmt.Sprint(i), 3000), got, "key %d", i)
					}
				}
				for err := range tx.Check() {
					require.NoError(t, err)
				}
				return nil
			}))
		})
	}
}
