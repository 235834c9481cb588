// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	hifparts "github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// packs is the store as package parts reads it.
type packs struct{ *Store }

func (p packs) PackPath(layer uint64) string { return p.Store.PackPath(LayerID(layer)) }

// viewed stores a layer with one file, whose pack is whole, commits it as snapshot "top" and makes its view.
func viewed(t *testing.T, data []byte) (b *bench, s *Store, l Layer, id, view string) {
	t.Helper()
	b, nvm := onDisk(t)
	s = b.open(func(c *Config) { c.NVMRoot = nvm })
	blob, diffID := layerOf(t, file{"large", data})
	b.blobs.write(t, blob)
	l = b.begin(spec(blob, diffID, unpack.ToPack))
	id = b.commit("top", "", l.ID)
	s.Release(l.ID)
	b.state(l.ID, Home)
	view, err := s.View(t.Context(), id, "top")
	require.NoError(t, err)
	return b, s, l, id, view
}

// Between the answer that names a view and the mount by the container, a layer of
// the view may have been unpacked anew: the container starts all the same, and
// reads the new pack.
func TestViewOfALayerThatIsReplacedBeforeItIsMounted(t *testing.T) {
	data := large("a", 2<<20)
	b, s, l, _, view := viewed(t, data)
	old := damage(t, s.PackPath(l.ID), data)
	require.NoError(t, s.views.forget(t.Context(), l.ID))
	b.read(view, func(root string) {
		got, err := os.ReadFile(filepath.Join(root, "large"))
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	})
	require.NoError(t, os.Remove(old))
	b.remove("top")
	b.gone(l.ID)
	require.NoDirExists(t, view)
}

// damage makes the pack at path one with other data, and puts a good one in its place.
func damage(t *testing.T, path string, data []byte) (old string) {
	t.Helper()
	good, err := os.ReadFile(path)
	require.NoError(t, err)
	old = path + ".old"
	require.NoError(t, os.Rename(path, old))
	at := bytes.Index(good, data[:4096])
	require.GreaterOrEqual(t, at, 0)
	f, err := os.OpenFile(old, os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(make([]byte, len(data)), int64(at))
	require.NoError(t, errors.Join(err, f.Close(), os.WriteFile(path, good, 0o600)))
	return old
}

// Between the answer that names the parts of a chain and the mount by the
// container, the parts may be dropped: the container starts all the same.
func TestPartsThatGoBeforeTheyAreMounted(t *testing.T) {
	data := large("a", 2<<20)
	b, s, l, id, view := viewed(t, data)
	if s.PartsPath(id) == "" {
		t.Skip("this kernel mounts no parts")
	}
	set := hifparts.Choose([]hifparts.Want{{
		Redirect: pack.Ref{Layer: uint64(l.ID), Number: 1}.Redirect(), Size: int64(len(data)), Ranges: []hifparts.Range{{Offset: 0, Length: 1 << 20}},
	}}, hifparts.Rules{MinSize: 1 << 18})
	for _, drop := range []string{"not wanted", "layer replaced"} {
		_, err := hifparts.Write(t.Context(), s.PartsPath(id), s.Tiers.DataRoot(), packs{s}, set, nopace)
		require.NoError(t, err)
		require.NoError(t, s.PartsChanged(t.Context(), id))
		point := s.Parts(t.Context(), id)
		require.NotEmpty(t, point)
		if drop == "not wanted" {
			require.NoError(t, os.Remove(s.PartsPath(id)))
			require.NoError(t, s.PartsChanged(t.Context(), id))
		} else {
			require.NoError(t, s.views.forget(t.Context(), l.ID))
			_, err = s.View(t.Context(), id, "top")
			require.NoError(t, err)
		}
		require.Empty(t, s.Parts(t.Context(), id), drop)
		root := t.TempDir()
		opts := "lowerdir=" + filepath.Join(view, "t") + "::" + s.Tiers.DataRoot() + "::" + point + "::" + filepath.Join(view, "h")
		for _, o := range s.Features().Options() {
			opts += "," + o
		}
		require.NoError(t, unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, opts), drop)
		got, err := os.ReadFile(filepath.Join(root, "large"))
		require.NoError(t, unix.Unmount(root, 0))
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got), drop)
	}
	b.remove("top")
	b.gone(l.ID)
	require.NoDirExists(t, s.partsPoint(id))
}
