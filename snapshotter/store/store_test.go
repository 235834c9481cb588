// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

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
			b.eventually("its directory goes", func() bool { _, err := os.Stat(s.Tiers.Staging(on, id)); return os.IsNotExist(err) })
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
