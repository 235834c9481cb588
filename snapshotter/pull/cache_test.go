// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// shelf is a content store on disk.
type shelf struct {
	t testing.TB
	content.Store
}

func newShelf(t testing.TB) shelf {
	t.Helper()
	s, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	return shelf{t, s}
}

func (s shelf) put(v any) ocispec.Descriptor {
	s.t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		b, err = json.Marshal(v)
		require.NoError(s.t, err)
	}
	d := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	require.NoError(s.t, content.WriteBlob(s.t.Context(), s, d.Digest.String(), strings.NewReader(string(b)), d))
	return d
}

func (s shelf) load(c *cache, d ocispec.Descriptor) blob {
	s.t.Helper()
	b, err := c.load(s.t.Context(), s, content.Info{Digest: d.Digest, Size: d.Size})
	require.NoError(s.t, err)
	return b
}

func image(diffs ...digest.Digest) ocispec.Image {
	i := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}, History: []ocispec.History{{CreatedBy: "ADD"}, {CreatedBy: "ENV", EmptyLayer: true}}}
	for range len(diffs) - 1 {
		i.History = append(i.History, ocispec.History{CreatedBy: "RUN"})
	}
	return i
}

func TestCache(t *testing.T) {
	s := newShelf(t)
	var c cache
	c.init()
	diffs := []digest.Digest{digest.FromString("a"), digest.FromString("b")}
	layers := []ocispec.Descriptor{{Digest: digest.FromString("A"), Size: 5, MediaType: ocispec.MediaTypeImageLayerGzip}, {Digest: digest.FromString("B"), Size: 6}}
	chain := identity.ChainIDs([]digest.Digest{diffs[0], diffs[1]})

	// The config comes later than the manifest: not an image yet, and that is not remembered.
	text, err := json.Marshal(image(diffs...))
	require.NoError(t, err)
	m := s.put(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: ocispec.Descriptor{Digest: digest.FromBytes(text), Size: int64(len(text))}, Layers: layers})
	assert.Nil(t, s.load(&c, m).manifest)
	config := s.put(text)
	got := s.load(&c, m).manifest
	require.NotNil(t, got)
	assert.Equal(t, []string{"ADD", "RUN"}, got.history)
	assert.Equal(t, LayerInfo{Digest: layers[1].Digest, Size: 6, DiffID: diffs[1], ChainID: chain[1]}, got.layers[1])
	assert.Equal(t, 1, got.index(chain[1]))
	assert.Equal(t, -1, got.index(diffs[1]))

	// From now on it is known without reading.
	require.NoError(t, s.Delete(t.Context(), m.Digest))
	assert.Same(t, got, s.load(&c, m).manifest)

	index := s.put(ocispec.Index{Manifests: []ocispec.Descriptor{m, {Digest: "nonsense"}}})
	assert.Equal(t, []ocispec.Descriptor{m}, s.load(&c, index).children)

	for name, v := range map[string]any{
		"gzip":                       []byte{0x1f, 0x8b, 8, 0},
		"cut JSON":                   []byte(`{"layers":[`),
		"wrong types":                []byte(`{"layers":"x","config":7}`),
		"a config":                   image(diffs[0]),
		"no layers":                  ocispec.Manifest{Config: config},
		"config that is no image":    ocispec.Manifest{Config: m2(s, `{"a":1}`), Layers: layers},
		"config that is no JSON":     ocispec.Manifest{Config: m2(s, `hello`), Layers: layers},
		"fewer layers than diff IDs": ocispec.Manifest{Config: config, Layers: layers[:1]},
		"a diff ID that is none":     ocispec.Manifest{Config: s.put(image("x", "y")), Layers: layers},
		"a layer without digest":     ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{layers[0], {Digest: "sha256:short"}}},
		"a negative size":            ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{layers[0], {Digest: layers[1].Digest, Size: -1}}},
		"a huge config":              ocispec.Manifest{Config: ocispec.Descriptor{Digest: config.Digest, Size: 1 << 40}, Layers: layers},
		"an attestation":             ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{statement("a"), statement("b")}},
		"another media type":         ocispec.Manifest{MediaType: "application/x", Config: config, Layers: layers},
	} {
		b := s.load(&c, s.put(v))
		assert.Nil(t, b.manifest, name)
		assert.Empty(t, b.children, name)
	}
	assert.Equal(t, blob{}, s.load(&c, ocispec.Descriptor{Digest: digest.FromString("large"), Size: 1 << 40}), "large blobs are not read at all")
}

// statement is a layer of an attestation as BuildKit makes it.
func statement(of string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: "application/vnd.in-toto+json", Digest: digest.FromString(of), Size: 7}
}

func TestOrder(t *testing.T) {
	at := func(architecture string, second int64) *Image {
		return &Image{platform: ocispec.Platform{OS: "linux", Architecture: architecture}, Started: time.Unix(second, 0)}
	}
	old, now, foreign, runnable, unknown := at("amd64", 1), at("amd64", 2), at("arm64", 4), at("386", 5), at("", 3)
	all := []*Image{unknown, foreign, old, runnable, now}
	order(all, platforms.Only(ocispec.Platform{OS: "linux", Architecture: "amd64"}))
	assert.Equal(t, []*Image{now, old, runnable, foreign, unknown}, all)
}

func m2(s shelf, text string) ocispec.Descriptor { return s.put([]byte(text)) }

func TestHistoryThatDoesNotFit(t *testing.T) {
	i := image(digest.FromString("a"), digest.FromString("b"))
	i.History = i.History[:2]
	text, err := json.Marshal(i)
	require.NoError(t, err)
	m := combine("sha256:x", []ocispec.Descriptor{{Digest: digest.FromString("A")}, {Digest: digest.FromString("B")}}, text)
	require.NotNil(t, m)
	assert.Equal(t, []string{"", ""}, m.history)
}

func FuzzCombine(f *testing.F) {
	text, err := json.Marshal(image(digest.FromString("a"), digest.FromString("b")))
	require.NoError(f, err)
	f.Add(text)
	f.Fuzz(func(t *testing.T, config []byte) {
		layers := []ocispec.Descriptor{{Digest: digest.FromString("A")}, {Digest: digest.FromString("B")}}
		if m := combine("sha256:x", layers, config); m != nil && (len(m.layers) != 2 || len(m.history) != 2) {
			t.Errorf("%+v", m)
		}
	})
}

func TestBlobOf(t *testing.T) {
	d := digest.FromString("x")
	for _, ref := range []string{"layer-" + d.String(), "layer-my-name@" + d.String(), "unknown-" + d.String(), d.String()} {
		got, ok := blobOf(ref)
		assert.True(t, ok, ref)
		assert.Equal(t, d, got)
	}
	for _, ref := range []string{"", "layer-", "layer-sha256:12", "extract-x@y"} {
		_, ok := blobOf(ref)
		assert.False(t, ok, ref)
	}
}

func TestBestName(t *testing.T) {
	d := digest.FromString("m")
	from := content.Info{Digest: d, Labels: map[string]string{"containerd.io/distribution.source.reg:5000": "a/b,c", "other": "x"}}
	assert.Equal(t, "x:1", bestName([]string{"a@" + d.String(), "x:1"}, "hint:1", from))
	assert.Equal(t, "a@sha", bestName([]string{"a@sha"}, "hint:1", from))
	assert.Equal(t, "hint:1", bestName(nil, "hint:1", from))
	assert.Equal(t, "reg:5000/a/b@"+d.String(), bestName(nil, "evil\x1b[2J", from))
	assert.Equal(t, "reg:5000/a/b@"+d.String(), bestName(nil, strings.Repeat("a", 600), from))
	assert.Empty(t, bestName(nil, "", content.Info{}))
}
