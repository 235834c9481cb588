// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

func nopace(int) error { return nil }

// begin unpacks a blob and waits for it.
func (b *bench) begin(s Spec) Layer {
	b.t.Helper()
	id, _, err := b.s.Begin(b.t.Context(), s)
	require.NoError(b.t, err)
	l, err := b.s.Await(b.t.Context(), id)
	require.NoError(b.t, err)
	return l
}

func TestLifeOfALayer(t *testing.T) {
	for _, c := range []struct {
		name  string
		to    unpack.Placement
		holes bool
		nvm   bool
	}{{"pack", unpack.ToPack, false, false}, {"nvm", unpack.ToNVM, true, true}, {"both", unpack.ToBoth, false, true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			s := b.open(nil)
			a, data := large("a", 100_000), large("b", 5000)
			blob, diffID := layerOf(t, file{"d/", nil}, file{"d/a", a}, file{"b", data}, file{"empty", []byte{}})
			b.blobs.write(t, blob)
			l := b.begin(spec(blob, diffID, c.to))
			require.Equal(t, diffID, l.DiffID)
			require.Equal(t, c.holes, l.Holes > 0)
			require.Equal(t, c.nvm, l.NVM > 0)
			id := b.commit("top", "", l.ID)
			s.Release(l.ID)

			// It can be read at once, and stays right while holes are filled and files leave NVM.
			view, err := s.View(t.Context(), id, "top")
			require.NoError(t, err)
			same := func() {
				t.Helper()
				b.read(view, func(root string) {
					for name, want := range map[string][]byte{"d/a": a, "b": data, "empty": {}} {
						got, err := os.ReadFile(filepath.Join(root, name))
						require.NoError(t, err)
						require.True(t, bytes.Equal(want, got), name)
					}
				})
			}
			same()
			b.state(l.ID, Home)
			same()
			for e, err := range s.Tiers.OnNVM(l.ID.String()) {
				require.NoError(t, err)
				_, _, err := s.Demote(pack.Ref{Layer: uint64(l.ID), Number: e.Number}.Redirect(), nil)
				require.NoError(t, err)
			}
			require.NoError(t, s.Counted(t.Context(), l.ID, 0))
			l, err = s.Layer(l.ID)
			require.NoError(t, err)
			require.Zero(t, l.NVM)
			same()
			for n := uint32(1); n <= 2; n++ {
				_, err := s.Promote(t.Context(), pack.Ref{Layer: uint64(l.ID), Number: n}.Redirect(), nopace)
				require.NoError(t, err)
			}
			same()

			b.remove("top")
			b.gone(l.ID)
		})
	}
}

func TestNothingLeavesNVMBeforeThePackIsWhole(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.WriteBack = false })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToNVM))
	b.state(l.ID, Durable)
	redirect := pack.Ref{Layer: uint64(l.ID), Number: 1}.Redirect()
	_, _, err := s.Demote(redirect, nil)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	// Who asks for it has the holes filled.
	require.NoError(t, s.AwaitHome(t.Context(), l.ID))
	freed, _, err := s.Demote(redirect, nil)
	require.NoError(t, err)
	require.Positive(t, freed)
}

func TestTwoSnapshotsShareALayer(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	again, fresh, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToPack))
	require.NoError(t, err)
	require.False(t, fresh)
	require.Equal(t, l.ID, again)
	b.commit("one", "", l.ID)
	b.commit("two", "", l.ID)
	s.Release(l.ID)
	s.Release(l.ID)
	b.remove("one")
	require.FileExists(t, s.PackPath(l.ID))
	b.remove("two")
	b.gone(l.ID)
}

// A layer is unpacked while its blob arrives, and nothing of it can be had before it is verified.
func TestUnpackedWhileItArrives(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 300_000)}, file{"b", large("b", 300_000)})
	first := make(chan string, 10)
	sp := spec(blob, diffID, unpack.ToPack)
	sp.Place = func(f unpack.File) unpack.Placement { first <- f.Path; return unpack.ToPack }
	id, fresh, err := s.Begin(t.Context(), sp)
	require.NoError(t, err)
	require.True(t, fresh)
	w, err := b.blobs.Writer(t.Context(), content.WithRef("default/1/layer-"+sp.Blob.String()), content.WithDescriptor(desc(blob)))
	require.NoError(t, err)
	half := len(blob) * 3 / 4
	_, err = w.Write(blob[:half])
	require.NoError(t, err)
	require.Equal(t, "a", <-first, "the first file is there before the blob is")
	l, err := s.Layer(id)
	require.NoError(t, err)
	require.Equal(t, Unpacking, l.State)
	_, err = w.Write(blob[half:])
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), sp.Size, sp.Blob))
	l, err = s.Await(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, diffID, l.DiffID)
}

// A download that is cut short, replaced or too long is read anew, and what becomes of it is right.
func TestDownloadThatBeginsAnew(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, b *bench, w content.Writer, ref string){
		"truncated": func(t *testing.T, _ *bench, w content.Writer, _ string) { require.NoError(t, w.Truncate(0)) },
		"replaced": func(t *testing.T, b *bench, w content.Writer, ref string) {
			require.NoError(t, w.Close())
			require.NoError(t, b.blobs.Abort(t.Context(), ref))
		},
		"too long": func(t *testing.T, b *bench, w content.Writer, ref string) {
			_, err := w.Write(make([]byte, 1<<20))
			require.NoError(t, err)
			require.NoError(t, w.Close())
			require.NoError(t, b.blobs.Abort(t.Context(), ref))
		},
	} {
		for _, to := range []unpack.Placement{unpack.ToPack, unpack.ToNVM} {
			t.Run(fmt.Sprint(name, " ", to), func(t *testing.T) {
				b := newBench(t)
				s := b.open(nil)
				data := large("a", 300_000)
				blob, diffID := layerOf(t, file{"a", data}, file{"b", large("b", 300_000)})
				sp := spec(blob, diffID, to)
				first := make(chan struct{}, 100)
				sp.Place = func(unpack.File) unpack.Placement { first <- struct{}{}; return to }
				id, _, err := s.Begin(t.Context(), sp)
				require.NoError(t, err)
				ref := "default/1/layer-" + sp.Blob.String()
				w, err := b.blobs.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(desc(blob)))
				require.NoError(t, err)
				_, err = w.Write(blob[:len(blob)*3/4])
				require.NoError(t, err)
				<-first
				spoil(t, b, w, ref)
				require.NoError(t, w.Close())
				w, err = b.blobs.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(desc(blob)))
				require.NoError(t, err)
				_, err = w.Write(blob)
				require.NoError(t, err)
				require.NoError(t, w.Commit(t.Context(), sp.Size, sp.Blob))
				l, err := s.Await(t.Context(), id)
				require.NoError(t, err)
				require.Equal(t, diffID, l.DiffID)
				snapshot := b.commit("top", "", id)
				s.Release(id)
				view, err := s.View(t.Context(), snapshot, "top")
				require.NoError(t, err)
				b.read(view, func(root string) {
					got, err := os.ReadFile(filepath.Join(root, "a"))
					require.NoError(t, err)
					require.True(t, bytes.Equal(data, got))
				})
				b.remove("top")
				b.gone(id)
			})
		}
	}
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 300_000)})
	id, _, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToNVM))
	require.NoError(t, err)
	s.Release(id)
	b.gone(id)
	entries, err := os.ReadDir(s.path("p"))
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestWrongBlobIsRefusedAndTheNextTrySucceeds(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	wrong := spec(blob, desc([]byte("x")).Digest, unpack.ToNVM)
	id, _, err := s.Begin(t.Context(), wrong)
	require.NoError(t, err)
	_, err = s.Await(t.Context(), id)
	require.ErrorContains(t, err, "diff ID")
	s.Release(id)
	b.gone(id)
	b.begin(spec(blob, diffID, unpack.ToNVM))
}

// An unpacking fails before anybody waits for it: nothing is going to be tried again, so that the failure is told.
func TestFailureBeforeTheWaitIsTold(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, _ := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	id, _, err := s.Begin(t.Context(), spec(blob, desc([]byte("x")).Digest, unpack.ToNVM))
	require.NoError(t, err)
	b.eventually("it has failed", func() bool { return s.Failure(id) != nil })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = s.Await(ctx, id)
	require.ErrorContains(t, err, "diff ID")
	s.Release(id)
	b.gone(id)
}

func TestByContentAPI(t *testing.T) {
	b := newBench(t)
	b.blobs.hidden = true
	b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	b.begin(spec(blob, diffID, unpack.ToPack))
}

// containerd's content root may be a path that means something else here.
func TestContentRootOfAnotherNamespace(t *testing.T) {
	for _, first := range []bool{true, false} {
		b := newBench(t)
		b.blobs.seenAs = t.TempDir()
		s := b.open(nil)
		blob, diffID := layerOf(t, file{"a", large("a", 9000)})
		if first {
			b.blobs.write(t, blob)
		}
		id, _, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToPack))
		require.NoError(t, err)
		if !first {
			b.blobs.write(t, blob)
			for range 3 { // whoever subscribes after the first is told by the next
				b.blobs.tell()
			}
		}
		b.eventually("it is read by the API", func() bool {
			b.blobs.tell()
			l, err := s.Layer(id)
			return err == nil && l.State.Valid()
		})
		s.Release(id)
	}
}

func TestAfterARestart(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.commit("top", "", l.ID)
	b.state(l.ID, Home)
	// What the database does not know goes.
	require.NoError(t, os.WriteFile(s.PackPath(77), []byte("x"), 0o600))
	require.NoError(t, os.MkdirAll(s.Tiers.LayerData("78"), 0o700))
	require.NoError(t, os.WriteFile(s.newPack(79), []byte("x"), 0o600))
	half, other := layerOf(t, file{"b", large("b", 9000)})
	_, _, err := s.Begin(t.Context(), spec(half, other, unpack.ToNVM)) // its blob never comes
	require.NoError(t, err)
	require.NoError(t, s.Close())

	s = b.open(nil)
	require.Equal(t, Home, b.state(l.ID, Home).State)
	b.eventually("garbage is gone", func() bool {
		entries, err := os.ReadDir(s.path("p"))
		require.NoError(t, err)
		data, err := s.Tiers.DataLayers()
		require.NoError(t, err)
		return len(entries) == 1 && len(data) == 0 && len(s.Layers()) == 1
	})
	id, _, err := s.Begin(t.Context(), spec(half, other, unpack.ToNVM))
	require.NoError(t, err)
	require.Greater(t, id, LayerID(78), "numbers are not given out twice")
	s.Release(id)
}

func TestAfterACrashOfTheMachine(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.BootID = "1" })
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.commit("top", "", l.ID)
	b.state(l.ID, Home)
	require.NoError(t, s.Close())
	// As if the power had gone before the sync: the record says so, and the pack is torn.
	s = b.open(func(c *Config) { c.BootID = "1" })
	require.NoError(t, s.updateLayer(t.Context(), l.ID, func(l *Layer) { l.State = Home }))
	require.NoError(t, s.db.update(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
		rec, err := getLayer(tx, l.ID)
		rec.State = Stored
		return errors.Join(err, putLayer(tx, rec))
	}))
	require.NoError(t, os.Truncate(s.PackPath(l.ID), 5000))
	require.NoError(t, s.Close())

	s = b.open(func(c *Config) { c.BootID = "2" })
	got := b.state(l.ID, Home)
	require.Equal(t, 1, got.Repairs)
	m, err := s.Metas(t.Context(), []LayerID{l.ID})
	require.NoError(t, err)
	require.Len(t, m[0].Root.Children, 1)
}

func TestDamagedMetadataAreUnpackedAnew(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	a := large("a", 9000)
	blob, diffID := layerOf(t, file{"a", a})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	id := b.commit("top", "", l.ID)
	b.state(l.ID, Home)
	flip(t, s.PackPath(l.ID), 5*pack.BlockSize+40) // among the inodes
	b.eventually("the view is made from a pack that was unpacked anew", func() bool {
		view, err := s.View(t.Context(), id, "top")
		if err != nil {
			return false
		}
		b.read(view, func(root string) {
			got, err := os.ReadFile(filepath.Join(root, "a"))
			require.NoError(t, err)
			require.True(t, bytes.Equal(a, got))
		})
		return true
	})
	l, err := s.Layer(l.ID)
	require.NoError(t, err)
	require.Equal(t, 1, l.Repairs)
}

func TestLossOfNVM(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.WriteBack = false })
	var layers []LayerID
	for i, to := range []unpack.Placement{unpack.ToPack, unpack.ToNVM, unpack.ToNVM, unpack.ToBoth} {
		blob, diffID := layerOf(t, file{"a", large(string(rune('a'+i)), 9000)})
		b.blobs.write(t, blob)
		l := b.begin(spec(blob, diffID, to))
		b.commit(string(rune('a'+i)), "", l.ID)
		layers = append(layers, l.ID)
	}
	b.state(layers[1], Durable)
	b.state(layers[2], Durable)
	require.Positive(t, b.state(layers[3], Home).NVM)
	require.NoError(t, s.FlushDatabase(t.Context()))
	require.NoError(t, s.AwaitHome(t.Context(), layers[2])) // the copy of the database does not know it
	saved, err := os.ReadFile(s.DatabasePath(placement.HDD))
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, os.WriteFile(s.DatabasePath(placement.HDD), saved, 0o600))
	require.NoError(t, os.RemoveAll(filepath.Join(b.dir, "nvm", "n")))

	s = b.open(func(c *Config) { c.WriteBack = false })
	b.state(layers[0], Home)
	require.Zero(t, b.state(layers[2], Home).Repairs, "its pack was whole")
	require.Zero(t, b.state(layers[3], Home).NVM, "its copies are gone")
	b.eventually("the layer with holes is unpacked anew", func() bool {
		l, err := s.Layer(layers[1])
		return err == nil && l.State == Home && l.Repairs == 1
	})
}

// stage makes an active snapshot with a writable directory.
func (b *bench) stage(key, parent string, on placement.Tier, fill func(dir string)) (id string) {
	b.t.Helper()
	name, err := b.s.Tiers.Prestage(on, 0, 0)
	require.NoError(b.t, err)
	require.NoError(b.t, b.s.UpdateTx(b.t.Context(), func(ctx context.Context, tx *bolt.Tx) error {
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent)
		if err != nil {
			return err
		}
		id = sn.ID
		return errors.Join(b.s.Tiers.Stage(id, on, name), PutSnapshot(tx, id, Snapshot{Key: key, Namespace: "default", Tier: on}))
	}))
	fill(b.s.Tiers.Upper(on, id))
	return id
}

func (b *bench) commitPath(key, name string) (layer LayerID) {
	b.t.Helper()
	var changed []LayerID
	require.NoError(b.t, b.s.UpdateTx(b.t.Context(), func(ctx context.Context, tx *bolt.Tx) error {
		id, err := storage.CommitActive(ctx, key, name, snapshots.Usage{})
		if err != nil {
			return err
		}
		parents, err := ChainBelow(ctx, tx, name)
		if err != nil {
			return err
		}
		changed, err = b.s.CommitPath(tx, id, parents)
		return err
	}))
	b.s.Bound(changed)
	return changed[len(changed)-1]
}

func TestDirectoryIsPacked(t *testing.T) {
	for _, on := range []placement.Tier{placement.NVM, placement.HDD} {
		t.Run(on.String(), func(t *testing.T) {
			b := newBench(t)
			s := b.open(nil)
			blob, diffID := layerOf(t, file{"old", large("old", 5000)})
			b.blobs.write(t, blob)
			below := b.begin(spec(blob, diffID, unpack.ToPack))
			b.commit("below", "", below.ID)
			data := large("new", 70_000)
			id := b.stage("work", "below", on, func(dir string) {
				require.NoError(t, os.WriteFile(filepath.Join(dir, "new"), data, 0o640))
				require.NoError(t, os.Link(filepath.Join(dir, "new"), filepath.Join(dir, "same")))
			})
			layer := b.commitPath("work", "top")
			l := b.state(layer, Home)
			require.Equal(t, on == placement.NVM, l.Holes > 0)
			require.NoDirExists(t, s.Tiers.Staging(on, id))
			view, err := s.View(t.Context(), id, "top")
			require.NoError(t, err)
			b.read(view, func(root string) {
				for name, want := range map[string][]byte{"old": large("old", 5000), "new": data, "same": data} {
					got, err := os.ReadFile(filepath.Join(root, name))
					require.NoError(t, err)
					require.True(t, bytes.Equal(want, got), name)
				}
			})
			b.remove("top")
			b.gone(layer)
		})
	}
}

func TestLostDirectoryIsNamed(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	id := b.stage("work", "", placement.NVM, func(string) {})
	require.NoError(t, s.Tiers.Unstage(id))
	layer := b.commitPath("work", "top")
	_, err := s.Await(t.Context(), layer)
	require.True(t, errdefs.IsDataLoss(err), err)
	require.ErrorContains(t, err, "is gone from nvm")
}

func TestOlderDatabaseIsRefused(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	require.NoError(t, s.UpdateTx(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Put(keySchema, []byte("1"))
	}))
	require.NoError(t, s.Close())
	_, err := Open(t.Context(), Config{Root: s.config.Root, NVMRoot: s.config.NVMRoot}, nil)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "older form of the store")
}

// A file comes to NVM while its layer is removed: nothing of it stays, though the record is still there.
func TestNothingComesBackOfALayerThatGoes(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	b.commit("top", "", l.ID)
	b.state(l.ID, Home)
	s.mu.Lock()
	s.layers[l.ID].dying = true
	s.mu.Unlock()
	_, err := s.Promote(t.Context(), pack.Ref{Layer: uint64(l.ID), Number: 1}.Redirect(), func(int) error { return nil })
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoDirExists(t, s.Tiers.LayerData(l.ID.String()))
	s.Release(l.ID)
	b.remove("top")
	b.gone(l.ID)
}
