// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func TestDamaged(t *testing.T) {
	has(t, Damaged([]*control.Snapshot{{Id: "1", Layer: "7"}}), OK, "images", "all layers can be used")
	all := Damaged([]*control.Snapshot{
		{Id: "1", Layer: "7", Namespace: "k8s.io", Images: []string{"docker.io/library/redis:7", "again:1"}, Error: "checksum of file 3\nis wrong; it is fetched again now and then; fetch it by hand: ctr -n k8s.io content fetch redis:7"},
		{Id: "2", Layer: "7", Error: "the same layer in another namespace"},
		{Id: "3", Error: "lost with its NVM"},
	})
	require.Len(t, all, 2)
	require.Equal(t, Finding{Area: "images", Level: Fail, Text: "layer 7 of docker.io/library/redis:7, again:1 cannot be used: checksum of file 3 is wrong; it is fetched again now and then",
		Cure: "fetch it by hand: ctr -n k8s.io content fetch redis:7"}, all[0])
	require.Equal(t, "layer 3 cannot be used: lost with its NVM", all[1].Text)
	require.NotEmpty(t, all[1].Cure)
}

// chains is a snapshotter that has these.
type chains map[string]bool

func (c chains) Stat(_ context.Context, key string) (snapshots.Info, error) {
	if !c[key] {
		return snapshots.Info{}, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	return snapshots.Info{}, nil
}

func TestImagesWithoutBlobs(t *testing.T) {
	cs, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	put := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		require.NoError(t, content.WriteBlob(t.Context(), cs, d.Digest.String(), bytes.NewReader(b), d))
		return d
	}
	putJSON := func(mediaType string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		require.NoError(t, err)
		return put(mediaType, b)
	}
	var diffs []digest.Digest
	var layers []ocispec.Descriptor
	for _, s := range []string{"one", "two", "three"} {
		diffs = append(diffs, digest.FromString("diff "+s))
		layers = append(layers, put(ocispec.MediaTypeImageLayerGzip, []byte(s)))
	}
	chain := identity.ChainIDs(append([]digest.Digest{}, diffs...))
	cfg := putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	img := images.Image{Name: "x", Target: putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cfg, Layers: layers,
	})}
	missing := func(c chains) int {
		l, err := lacks(t.Context(), cs, c, img)
		require.NoError(t, err)
		return l.missing
	}
	require.Zero(t, missing(nil)) // nothing is unpacked, and all blobs are there

	// discard_unpacked_layers of another snapshotter
	require.NoError(t, cs.Delete(t.Context(), layers[0].Digest))
	require.NoError(t, cs.Delete(t.Context(), layers[2].Digest))
	require.Equal(t, 2, missing(nil))
	require.Equal(t, 1, missing(chains{chain[0].String(): true}))
	require.Equal(t, 1, missing(chains{chain[1].String(): true}))
	require.Zero(t, missing(chains{chain[2].String(): true})) // of the topmost all below follows

	require.NoError(t, cs.Delete(t.Context(), cfg.Digest))
	require.Zero(t, missing(nil)) // not an image for this platform
}

func TestImagesAreNamedOnce(t *testing.T) {
	one, two := digest.FromString("1"), digest.FromString("2")
	have := onceEach([]lacking{
		{namespace: "k8s.io", image: "sha256:0123", target: one}, {namespace: "k8s.io", image: "redis@sha256:1", target: one}, {namespace: "k8s.io", image: "redis:7", target: one},
		{namespace: "k8s.io", image: "pause@sha256:2", target: two}, {namespace: "default", image: "redis:7", target: one},
	})
	var names []string
	for _, l := range have {
		names = append(names, l.namespace+" "+l.image)
	}
	require.ElementsMatch(t, []string{"default redis:7", "k8s.io redis:7", "k8s.io pause@sha256:2"}, names)
}

func TestBlobsWithoutContainerd(t *testing.T) {
	c := config.Default()
	c.Containerd.Address = "/nowhere/c.sock"
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	has(t, Blobs(ctx, c, "nhybrid"), Warn, "images", "were not held against their blobs")
}
