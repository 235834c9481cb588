// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LayerInfo is one layer as manifest and config name it.
type LayerInfo struct {
	Digest    digest.Digest // of the blob
	Size      int64         // bytes of the blob
	MediaType string
	DiffID    digest.Digest // of the uncompressed tar
	ChainID   digest.Digest // of this layer and all below
}

// Image is an image in containerd's content store, with or without its layers. It remembers which of them have been seen to arrive, so
// keep it through one pull, and take a new one from Find for the next. Its methods and Watcher.Progress may be called at the
// same time; the fields are not to be changed.
type Image struct {
	Namespace string
	Manifest  digest.Digest
	Name      string      // reference, as far as it is known; during a pull that may be registry/repository@digest only (without the registry's port), or ""
	Recorded  bool        // the image store has Name
	Layers    []LayerInfo // bottom first, at least one
	History   []string    // what made each layer ("RUN …"); "" where the config does not tell
	Started   time.Time   // when the manifest arrived

	config   ocispec.Descriptor
	platform ocispec.Platform

	mu   sync.Mutex
	seen []arrival // by layer
}

// Index returns the index of the layer whose chain ID is given, or -1.
func (i *Image) Index(chainID digest.Digest) int {
	return slices.IndexFunc(i.Layers, func(l LayerInfo) bool { return l.ChainID == chainID })
}

// listing is the content of one namespace at one moment.
type listing map[digest.Digest]content.Info

func list(ctx context.Context, cs content.Store) (listing, error) {
	l := listing{}
	err := cs.Walk(ctx, func(i content.Info) error {
		l[i.Digest] = i
		return nil
	})
	return l, err
}

// missing returns how many layers of m have not arrived.
func (l listing) missing(m *manifest) int {
	n := 0
	for _, x := range m.layers {
		if _, ok := l[x.Digest]; !ok {
			n++
		}
	}
	return n
}

// Find returns the image in namespace ns whose chain of layers contains chainID, and the index of that layer. If several
// images share the layer, one that still lacks layers is taken, since that is the one being pulled; among equals the one whose
// manifest arrived last.
//
// The labels of the snapshot may help (containerd.io/snapshot/cri.manifest-digest and cri.image-ref). They can be set by whoever made
// the image, so they are hints: the manifest named must have the chain ID, and a name is used only for display.
//
// Errors: errdefs.ErrNotFound if no image has it, ErrInvalidArgument, ErrUnavailable.
func (w *Watcher) Find(ctx context.Context, ns, chainID string, hints map[string]string) (*Image, int, error) {
	what := fmt.Sprintf("find image of layer %q in namespace %q", chainID, ns)
	chain, err := digest.Parse(chainID)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w: %w", what, err, errdefs.ErrInvalidArgument)
	}
	c, inner, cancel, err := w.begin(ctx, ns)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	cs := c.ContentStore()

	var best *manifest
	var info content.Info
	if d, err := digest.Parse(hints[snapshotters.TargetManifestDigestLabel]); err == nil {
		i, err := cs.Info(inner, d)
		if err == nil {
			var b blob
			if b, err = w.cache.load(inner, cs, i); err == nil && b.manifest.index(chain) >= 0 {
				best, info = b.manifest, i
			}
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, 0, w.classify(ctx, what, err)
		}
	}
	if best == nil {
		found, l, err := w.candidates(inner, cs, chain)
		if err != nil {
			return nil, 0, w.classify(ctx, what, err)
		}
		if len(found) == 0 {
			return nil, 0, fmt.Errorf("%s: no manifest in the content store has it: %w", what, errdefs.ErrNotFound)
		}
		best = found[0]
		info = l[best.digest]
	}
	img := newImage(ns, best, info)
	names, err := w.names(inner, cs, c.ImageService())
	if err != nil {
		return nil, 0, w.classify(ctx, what, err)
	}
	img.Name, img.Recorded = bestName(names[best.digest], hints[snapshotters.TargetRefLabel], info), len(names[best.digest]) > 0
	return img, img.Index(chain), nil
}

// candidates returns the manifests that contain chain (all if it is ""), the likeliest first, and the listing they were found in.
func (w *Watcher) candidates(ctx context.Context, cs content.Store, chain digest.Digest) ([]*manifest, listing, error) {
	l, err := list(ctx, cs)
	if err != nil {
		return nil, nil, err
	}
	var found []*manifest
	for _, i := range l {
		b, err := w.cache.load(ctx, cs, i)
		if errdefs.IsNotFound(err) {
			continue // collected meanwhile
		}
		if err != nil {
			return nil, nil, err
		}
		if b.manifest != nil && (chain == "" || b.manifest.index(chain) >= 0) {
			found = append(found, b.manifest)
		}
	}
	sort.Slice(found, func(a, b int) bool {
		x, y := found[a], found[b]
		if mx, my := l.missing(x) > 0, l.missing(y) > 0; mx != my {
			return mx
		}
		if tx, ty := l[x.digest].CreatedAt, l[y.digest].CreatedAt; !tx.Equal(ty) {
			return tx.After(ty)
		}
		return x.digest < y.digest
	})
	return found, l, nil
}

// Images returns all images of namespace ns whose manifest and config are in the content store, newest manifest first.
// Manifests that no image record names (of a pull that is not over, say) are among them, with a Name of registry/repository@digest or "".
func (w *Watcher) Images(ctx context.Context, ns string) ([]*Image, error) {
	what := fmt.Sprintf("list images of namespace %q", ns)
	c, inner, cancel, err := w.begin(ctx, ns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	cs := c.ContentStore()
	found, l, err := w.candidates(inner, cs, "")
	if err != nil {
		return nil, w.classify(ctx, what, err)
	}
	names, err := w.names(inner, cs, c.ImageService())
	if err != nil {
		return nil, w.classify(ctx, what, err)
	}
	out := make([]*Image, 0, len(found))
	for _, m := range found {
		img := newImage(ns, m, l[m.digest])
		img.Name, img.Recorded = bestName(names[m.digest], "", l[m.digest]), len(names[m.digest]) > 0
		out = append(out, img)
	}
	sort.SliceStable(out, func(a, b int) bool { return out[a].Started.After(out[b].Started) })
	return out, nil
}

// Lookup returns the images of namespace ns that ref names, at least one: ref is a name of the image store, or the digest of a
// manifest or an index. Of an index they are those that are in the content store, in containerd's order: the host's platform
// first, then those that it can run, then others; among equals the newest. The error is errdefs.ErrNotFound if there is none.
func (w *Watcher) Lookup(ctx context.Context, ns, ref string) ([]*Image, error) {
	what := fmt.Sprintf("look up image %q in namespace %q", ref, ns)
	c, inner, cancel, err := w.begin(ctx, ns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	found, err := w.named(inner, c.ContentStore(), c.ImageService(), ns, ref)
	if err != nil {
		return nil, w.classify(ctx, what, err)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s: %w", what, errdefs.ErrNotFound)
	}
	return found, nil
}

// named does the work of Lookup.
func (w *Watcher) named(ctx context.Context, cs content.Store, is images.Store, ns, ref string) ([]*Image, error) {
	var root ocispec.Descriptor
	var names map[digest.Digest][]string
	record, err := is.Get(ctx, ref)
	d, noDigest := digest.Parse(ref)
	switch {
	case err == nil: // CRI has records with digests of configs for names, too
		root = record.Target
	case errdefs.IsNotFound(err) && noDigest == nil:
		info, err := cs.Info(ctx, d)
		if err != nil {
			return nil, err
		}
		// The blob itself tells whether it is an index.
		root = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: d, Size: info.Size}
		if names, err = w.names(ctx, cs, is); err != nil {
			return nil, err
		}
	default:
		return nil, err
	}
	digests, err := w.below(ctx, cs, root)
	if err != nil {
		return nil, err
	}
	var found []*Image
	for _, d := range digests {
		info, err := cs.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // of another platform, and not fetched
		}
		if err != nil {
			return nil, err
		}
		b, err := w.cache.load(ctx, cs, info)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		if b.manifest == nil {
			continue
		}
		img := newImage(ns, b.manifest, info)
		img.Name, img.Recorded = ref, true
		if names != nil {
			img.Name, img.Recorded = bestName(names[d], "", info), len(names[d]) > 0
		}
		found = append(found, img)
	}
	order(found, platforms.Default())
	return found, nil
}

// order sorts images by platform as host prefers them, and those of the same worth by age, the newest first.
func order(all []*Image, host platforms.MatchComparer) {
	slices.SortStableFunc(all, func(a, b *Image) int {
		switch {
		case host.Less(a.platform, b.platform):
			return -1
		case host.Less(b.platform, a.platform):
			return 1
		}
		return b.Started.Compare(a.Started)
	})
}

// names returns the names that the image store has for each manifest, sorted, those that name it through an index among them.
func (w *Watcher) names(ctx context.Context, cs content.Store, is images.Store) (map[digest.Digest][]string, error) {
	records, err := is.List(ctx)
	if err != nil {
		return nil, err
	}
	out := map[digest.Digest][]string{}
	for _, r := range records {
		targets, err := w.below(ctx, cs, r.Target)
		if err != nil {
			return nil, err
		}
		for _, t := range targets {
			out[t] = append(out[t], r.Name)
		}
	}
	for _, n := range out {
		sort.Strings(n)
	}
	return out, nil
}

// below returns the digest of a manifest or index and, each once, those of all that an index names, by way of other indexes
// too. What is not in the content store is named, but not looked into.
func (w *Watcher) below(ctx context.Context, cs content.Store, root ocispec.Descriptor) ([]digest.Digest, error) {
	var all []digest.Digest
	for next := []ocispec.Descriptor{root}; len(next) > 0; next = next[1:] {
		d := next[0]
		if slices.Contains(all, d.Digest) {
			continue
		}
		all = append(all, d.Digest)
		if !images.IsIndexType(d.MediaType) {
			continue
		}
		b, err := w.cache.load(ctx, cs, content.Info{Digest: d.Digest, Size: d.Size})
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		next = append(next, b.children...)
	}
	return all, nil
}

func newImage(ns string, m *manifest, i content.Info) *Image {
	return &Image{Namespace: ns, Manifest: m.digest, config: m.config, platform: m.platform, Layers: m.layers, History: m.history, Started: i.CreatedAt, seen: make([]arrival, len(m.layers))}
}

// bestName picks a name for people: of the image store, else from the snapshot's label, else where containerd fetched it from.
func bestName(known []string, hint string, manifest content.Info) string {
	for _, n := range known {
		if !strings.Contains(n, "@") { // CRI adds records by digest
			return n
		}
	}
	if len(known) > 0 {
		return known[0]
	}
	if printable(hint) {
		return hint
	}
	var sources []string
	for k, v := range manifest.Labels {
		if host, ok := strings.CutPrefix(k, labels.LabelDistributionSource+"."); ok {
			repo, _, _ := strings.Cut(v, ",")
			if s := host + "/" + repo + "@" + manifest.Digest.String(); printable(s) {
				sources = append(sources, s)
			}
		}
	}
	if len(sources) == 0 {
		return ""
	}
	return slices.Min(sources)
}

// printable tells whether an untrusted name may be shown on a terminal.
func printable(s string) bool {
	return s != "" && len(s) <= 512 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}
