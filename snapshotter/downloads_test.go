// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// downloads plays containerd's part in pulls on a real content store: blobs arrive
// when the test says so. What the real one does is tested with the real one.
type downloads struct {
	content.Store
	root  string
	img   *pull.Image
	blobs [][]byte
	wake  chan struct{}

	mu     sync.Mutex
	layers []placement.Layer
}

// entry is one entry of a layer.
type entry struct {
	name string
	data string // "" for a directory if the name ends in a slash
	uid  int
}

func newDownloads(t *testing.T, layers ...[]entry) *downloads {
	t.Helper()
	d := &downloads{root: t.TempDir(), wake: make(chan struct{}, 1)}
	var err error
	d.Store, err = local.NewStore(d.root)
	require.NoError(t, err)
	d.img = &pull.Image{Namespace: "test", Manifest: digest.FromString(t.Name()), Name: "registry/image:1"}
	var diffIDs []digest.Digest
	for _, entries := range layers {
		var plain, blob bytes.Buffer
		w := tar.NewWriter(&plain)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Uid: e.uid, Gid: e.uid, Typeflag: tar.TypeReg, ModTime: time.Unix(1, 0)}
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag, h.Mode = tar.TypeDir, 0o755
			}
			require.NoError(t, w.WriteHeader(h))
			_, err := w.Write([]byte(e.data))
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		z := gzip.NewWriter(&blob)
		_, err := z.Write(plain.Bytes())
		require.NoError(t, err)
		require.NoError(t, z.Close())
		diffIDs = append(diffIDs, digest.FromBytes(plain.Bytes()))
		d.blobs = append(d.blobs, blob.Bytes())
		n := int64(blob.Len())
		d.img.Layers = append(d.img.Layers, pull.LayerInfo{
			Digest: digest.FromBytes(blob.Bytes()), DiffID: digest.FromBytes(plain.Bytes()), ChainID: identity.ChainID(diffIDs), Size: n, MediaType: ocispec.MediaTypeImageLayerGzip,
		})
		d.layers = append(d.layers, placement.Layer{Digest: digest.FromBytes(blob.Bytes()).String(), Compressed: n})
	}
	return d
}

func (d *downloads) chainID(i int) string { return d.img.Layers[i].ChainID.String() }

func (d *downloads) desc(i int) ocispec.Descriptor {
	l := d.img.Layers[i]
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}
}

// fetch brings the blob of a layer, and tells nobody.
func (d *downloads) fetch(t *testing.T, i int) {
	t.Helper()
	desc := d.desc(i)
	require.NoError(t, content.WriteBlob(t.Context(), d.Store, "layer-"+desc.Digest.String(), bytes.NewReader(d.blobs[i]), desc))
}

// arrive brings the blob of a layer, or of all.
func (d *downloads) arrive(t *testing.T, layers ...int) {
	t.Helper()
	for _, i := range layers {
		d.fetch(t, i)
		d.mu.Lock()
		d.layers[i].Downloaded, d.layers[i].Offset, d.layers[i].Arrived = true, d.layers[i].Compressed, time.Now()
		d.mu.Unlock()
		select {
		case d.wake <- struct{}{}:
		default:
		}
	}
}

func (d *downloads) Find(_ context.Context, ns, chainID string, _ map[string]string) (*pull.Image, int, error) {
	if i := d.img.Index(digest.Digest(chainID)); i >= 0 && ns == d.img.Namespace {
		return d.img, i, nil
	}
	return nil, 0, errdefs.ErrNotFound
}

func (d *downloads) Progress(context.Context, *pull.Image) ([]placement.Layer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]placement.Layer(nil), d.layers...), nil
}

func (d *downloads) Subscribe(string) (<-chan struct{}, func()) { return d.wake, func() {} }

func (d *downloads) ContentRoot(context.Context) string { return d.root }

func (d *downloads) Fetch(context.Context, []string, ocispec.Descriptor) (io.ReadCloser, string, error) {
	return nil, "", errdefs.ErrNotFound
}

func (d *downloads) Provider(context.Context, string) (content.Provider, error) { return d.Store, nil }
