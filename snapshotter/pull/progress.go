// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/placement"
)

// arrival is what an Image remembers of one layer.
type arrival struct {
	there        bool
	at           time.Time // zero if it was there before the image's manifest
	uncompressed int64
	exact        bool
}

// Progress returns the layers of img, bottom first, with what containerd has downloaded of each and how large each is or may be
// uncompressed. Storing, Stored and Tier are the caller's to fill in: Stored also for layers that were in the snapshotter before
// this pull, since containerd skips their download.
//
// containerd writes a download in steps of 1 MiB (copyWithBuffer in its core/content), so Offset moves in these, and a blob below
// that size has none before it is whole.
//
// A layer that was once seen stays downloaded, even if containerd drops its blob after unpacking (discard_unpacked_layers).
// The error is errdefs.ErrUnavailable if containerd is absent.
func (w *Watcher) Progress(ctx context.Context, img *Image) ([]placement.Layer, error) {
	what := fmt.Sprintf("look at the download of image %q", img.Manifest)
	img.mu.Lock()
	defer img.mu.Unlock()
	var offsets map[digest.Digest]int64
	if !img.complete() {
		c, inner, cancel, err := w.begin(ctx, img.Namespace)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		defer cancel()
		// Ask for what runs first and for what is there second: a layer that arrives between the two is found to be there,
		// the other way round it would be nowhere.
		if offsets, err = running(inner, c.ContentStore()); err == nil {
			err = img.look(inner, c.ContentStore())
		}
		if err != nil {
			return nil, w.classify(ctx, what, err)
		}
	}
	return img.values(offsets), nil
}

func (i *Image) complete() bool {
	for _, s := range i.seen {
		if !s.there {
			return false
		}
	}
	return true
}

// running returns the bytes received of each blob that is being downloaded.
func running(ctx context.Context, cs content.Store) (map[digest.Digest]int64, error) {
	statuses, err := cs.ListStatuses(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[digest.Digest]int64, len(statuses))
	for _, s := range statuses {
		if d, ok := blobOf(s.Ref); ok {
			out[d] = max(out[d], s.Offset)
		}
	}
	return out, nil
}

// blobOf returns the digest in an ingest reference of containerd: "layer-sha256:…", or "layer-<name>@sha256:…" for a descriptor with
// the annotation org.opencontainers.image.ref.name (MakeRefKey in containerd's core/remotes).
func blobOf(ref string) (digest.Digest, bool) {
	d, err := digest.Parse(ref[strings.LastIndexAny(ref, "-@")+1:])
	return d, err == nil
}

// look finds out which layers have arrived.
func (i *Image) look(ctx context.Context, cs content.Store) error {
	for k, l := range i.Layers {
		if i.seen[k].there {
			continue
		}
		info, err := cs.Info(ctx, l.Digest)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		a := arrival{there: true}
		if info.CreatedAt.After(i.Started) {
			a.at = info.CreatedAt
		}
		ra, err := cs.ReaderAt(ctx, ocispec.Descriptor{Digest: l.Digest, Size: l.Size})
		if err != nil {
			// Gone again, or no answer: it has arrived all the same, only its size stays an estimate.
			a.uncompressed = placement.EstimateUncompressed(l.Size)
		} else {
			a.uncompressed, a.exact = UncompressedSize(ra, l.Size, l.MediaType)
			ra.Close()
		}
		i.seen[k] = a
	}
	return nil
}

func (i *Image) values(offsets map[digest.Digest]int64) []placement.Layer {
	out := make([]placement.Layer, len(i.Layers))
	for k, l := range i.Layers {
		s := i.seen[k]
		p := placement.Layer{Digest: l.Digest.String(), Compressed: l.Size, Downloaded: s.there, Arrived: s.at}
		if s.there {
			p.Offset, p.Uncompressed, p.Exact = l.Size, s.uncompressed, s.exact
		} else {
			p.Offset, p.Uncompressed = min(max(offsets[l.Digest], 0), l.Size), placement.EstimateUncompressed(l.Size)
		}
		out[k] = p
	}
	return out
}

// Provider reads the blobs of namespace ns. Its readers are good for as long as the context is that they were opened with.
// Their bytes are as containerd verified them when they arrived.
func (w *Watcher) Provider(ctx context.Context, ns string) (content.Provider, error) {
	if err := namespaceRequired(ns); err != nil {
		return nil, err
	}
	c, err := w.connect()
	if err != nil {
		return nil, err
	}
	reconnect(ctx, c)
	return provider{c.ContentStore(), ns}, nil
}

type provider struct {
	content.Provider
	namespace string
}

func (p provider) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return p.Provider.ReaderAt(namespaces.WithNamespace(ctx, p.namespace), desc)
}
