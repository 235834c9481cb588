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

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

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
