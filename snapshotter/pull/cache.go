// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// Registries refuse manifests above 4 MiB (OCI distribution specification); configs hold the history too.
	maxManifest = 4 << 20
	maxConfig   = 16 << 20
	// An entry without a manifest takes some 150 bytes, so a full cache of them takes about 10 MB.
	maxEntries = 1 << 16
)

// manifest is what is needed of an image's manifest and config. It never changes, as it is named by its digest.
type manifest struct {
	digest digest.Digest
	config ocispec.Descriptor
	// platform is what the config says: an index need not, and the digest of a manifest names none.
	platform ocispec.Platform
	layers   []LayerInfo
	history  []string
}

// index returns the index of the layer with that chain ID, -1 if m is nil or has none.
func (m *manifest) index(chain digest.Digest) int {
	if m == nil {
		return -1
	}
	return slices.IndexFunc(m.layers, func(l LayerInfo) bool { return l.ChainID == chain })
}

// blob is what a small blob turned out to be: an image's manifest, an index, or neither.
type blob struct {
	manifest *manifest
	children []ocispec.Descriptor // of an index
}

// cache remembers blobs by digest. What a digest names is the same in all namespaces and for ever; whether it is there is for the
// caller to ask first.
type cache struct {
	mu    sync.Mutex
	blobs map[digest.Digest]blob
}

func (c *cache) init() { c.blobs = map[digest.Digest]blob{} }

// load returns what the blob is. A manifest whose config has not arrived counts as neither, for now.
func (c *cache) load(ctx context.Context, cs content.Store, i content.Info) (blob, error) {
	if i.Size > maxManifest || i.Size < 2 {
		return blob{}, nil
	}
	c.mu.Lock()
	b, ok := c.blobs[i.Digest]
	c.mu.Unlock()
	if ok {
		return b, nil
	}
	b, lasting, err := parse(ctx, cs, i)
	if err != nil || !lasting {
		return b, err
	}
	c.mu.Lock()
	if len(c.blobs) >= maxEntries {
		c.blobs = map[digest.Digest]blob{} // rare, and cheaper than keeping an order
	}
	c.blobs[i.Digest] = b
	c.mu.Unlock()
	return b, nil
}

// parse reads a blob that may be a manifest or an index; lasting tells whether asking again would give the same.
func parse(ctx context.Context, cs content.Store, i content.Info) (b blob, lasting bool, err error) {
	ra, err := cs.ReaderAt(ctx, ocispec.Descriptor{Digest: i.Digest, Size: i.Size})
	if err != nil {
		return blob{}, false, err
	}
	defer ra.Close()
	// Most blobs are layers: one byte tells, without reading them.
	var first [1]byte
	if _, err := ra.ReadAt(first[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return blob{}, false, err
	}
	if first[0] != '{' {
		return blob{}, true, nil
	}
	text := make([]byte, i.Size)
	if n, err := ra.ReadAt(text, 0); err != nil && (!errors.Is(err, io.EOF) || n < len(text)) {
		return blob{}, false, err
	}
	var m struct {
		MediaType string               `json:"mediaType"`
		Config    ocispec.Descriptor   `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if json.Unmarshal(text, &m) != nil {
		return blob{}, true, nil
	}
	if len(m.Manifests) > 0 && (m.MediaType == "" || images.IsIndexType(m.MediaType)) {
		for _, d := range m.Manifests {
			if d.Digest.Validate() == nil {
				b.children = append(b.children, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
			}
		}
		return b, true, nil
	}
	if len(m.Layers) == 0 || m.Config.Digest.Validate() != nil || m.Config.Size < 0 || m.Config.Size > maxConfig ||
		(m.MediaType != "" && !images.IsManifestType(m.MediaType)) {
		return blob{}, true, nil
	}
	// The size that counts is that of the blob, not the one that the manifest states.
	if info, err := cs.Info(ctx, m.Config.Digest); err == nil && info.Size > maxConfig {
		return blob{}, true, nil
	}
	text, err = content.ReadBlob(ctx, cs, m.Config)
	if errdefs.IsNotFound(err) {
		return blob{}, false, nil
	}
	if err != nil {
		return blob{}, false, err
	}
	if b.manifest = combine(i.Digest, m.Layers, text); b.manifest != nil {
		b.manifest.config = m.Config
	}
	return b, true, nil
}

// mayUnpack tells layers from what else a manifest of the form of an image's holds. The attestation that BuildKit puts beside
// an image has a config with a diff ID for each of its statements (application/vnd.in-toto+json), but is never unpacked.
func mayUnpack(layer ocispec.Descriptor) bool {
	return layer.MediaType == "" || images.IsLayerType(layer.MediaType)
}

// combine returns the image that layers and config describe; nil if they are no image or do not fit together.
func combine(d digest.Digest, layers []ocispec.Descriptor, config []byte) *manifest {
	var c struct {
		ocispec.Platform
		RootFS  ocispec.RootFS    `json:"rootfs"`
		History []ocispec.History `json:"history"`
	}
	if json.Unmarshal(config, &c) != nil || len(c.RootFS.DiffIDs) != len(layers) || !slices.ContainsFunc(layers, mayUnpack) {
		return nil
	}
	for _, id := range c.RootFS.DiffIDs {
		if id.Validate() != nil {
			return nil
		}
	}
	chain := identity.ChainIDs(slices.Clone(c.RootFS.DiffIDs)) // overwrites what it is given
	m := &manifest{digest: d, platform: c.Platform, history: make([]string, len(layers))}
	for i, l := range layers {
		if l.Digest.Validate() != nil || l.Size < 0 {
			return nil
		}
		m.layers = append(m.layers, LayerInfo{Digest: l.Digest, Size: l.Size, MediaType: l.MediaType, DiffID: c.RootFS.DiffIDs[i], ChainID: chain[i]})
	}
	// The history is free text that builders keep more or less well: use it only if it fits the layers.
	var steps []string
	for _, h := range c.History {
		if !h.EmptyLayer {
			steps = append(steps, h.CreatedBy)
		}
	}
	if len(steps) == len(layers) {
		copy(m.history, steps)
	}
	return m
}
