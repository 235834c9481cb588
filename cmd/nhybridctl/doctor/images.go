// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// mostImages bounds the images that are named one by one.
const mostImages = 20

// Damaged names the layers that cannot be used, with the cure.
func Damaged(all []*control.Snapshot) []Finding {
	f := &findings{area: "images"}
	seen := map[string]bool{}
	for _, s := range all {
		if s.GetError() == "" || (s.GetLayer() != "" && seen[s.GetLayer()]) {
			continue
		}
		seen[s.GetLayer()] = true
		text, cure := control.Cure(control.Message(s.GetError()))
		of := ""
		if names := s.GetImages(); len(names) > 0 {
			of = " of " + strings.Join(names, ", ")
		}
		f.add(Fail, cmp.Or(cure, "remove what uses the layer, and pull it again"), "layer %s%s cannot be used: %s", cmp.Or(s.GetLayer(), s.GetId()), of, text)
	}
	if len(f.all) == 0 {
		f.ok("all layers can be used")
	}
	return f.all
}

// fetch is the command that brings the blobs of an image back.
func fetch(namespace, image string) string {
	return fmt.Sprintf("ctr -n %s content fetch %s", namespace, image)
}

// Blobs names the images that nhybrid, known to containerd as name, would have to unpack at their first use and cannot, since
// blobs are gone: images that another snapshotter unpacked under discard_unpacked_layers.
func Blobs(ctx context.Context, c config.Config, name string) []Finding {
	f := &findings{area: "images"}
	all, err := withoutBlobs(ctx, c.Containerd.Address, name)
	if err != nil {
		f.add(Warn, "mend what is said of containerd, and run nhybridctl doctor again", "images were not held against their blobs: %s", control.ErrorMessage(err))
		return f.all
	}
	for i, l := range all {
		if i == mostImages {
			f.add(Warn, "as above", "%d more images lack blobs", len(all)-i)
			break
		}
		cure := fetch(l.namespace, l.image)
		if l.namespace == "k8s.io" {
			cure += ", or crictl pull " + l.image
		}
		f.add(Warn, cure, "image %s of namespace %s is not unpacked for %q and lacks %d of its %d blobs: its first use fails (\"content digest … not found\")", l.image, l.namespace, name, l.missing, l.layers)
	}
	if len(all) == 0 {
		f.ok("every image is unpacked, or has the blobs to be unpacked from")
	}
	return f.all
}

// lacking is an image that cannot be unpacked.
type lacking struct {
	namespace, image string
	target           digest.Digest
	missing, layers  int
}

func withoutBlobs(ctx context.Context, address, name string) ([]lacking, error) {
	if c, err := net.DialTimeout("unix", address, time.Second); err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err) // containerd's client waits for a socket to appear
	} else if err := c.Close(); err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	client, err := containerd.New(address)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %q: %w", address, err)
	}
	defer client.Close()
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var all []lacking
	for _, ns := range spaces {
		ctx := namespaces.WithNamespace(ctx, ns)
		list, err := client.ImageService().List(ctx)
		if err != nil {
			return nil, fmt.Errorf("list images of namespace %q: %w", ns, err)
		}
		for _, img := range list {
			l, err := lacks(ctx, client.ContentStore(), client.SnapshotService(name), img)
			if err != nil {
				return nil, fmt.Errorf("look at image %q of namespace %q: %w", img.Name, ns, err)
			}
			if l.missing > 0 {
				l.namespace, l.image, l.target = ns, img.Name, img.Target.Digest
				all = append(all, l)
			}
		}
	}
	return onceEach(all), nil
}

// onceEach leaves of the names of one image the first of the best: CRI keeps each image by its tag, by its digest and by its id.
func onceEach(all []lacking) []lacking {
	rank := func(name string) int {
		switch {
		case strings.HasPrefix(name, "sha256:"):
			return 2
		case strings.Contains(name, "@"):
			return 1
		}
		return 0
	}
	slices.SortFunc(all, func(a, b lacking) int {
		return cmp.Or(strings.Compare(a.namespace, b.namespace), strings.Compare(a.target.String(), b.target.String()), rank(a.image)-rank(b.image), strings.Compare(a.image, b.image))
	})
	return slices.CompactFunc(all, func(a, b lacking) bool { return a.namespace == b.namespace && a.target == b.target })
}

// stat is what is asked of a snapshotter.
type stat interface {
	Stat(ctx context.Context, key string) (snapshots.Info, error)
}

// lacks counts the blobs of img for this platform that a snapshotter lacks to unpack it: those that are gone, above the layers
// that it has. An image without a manifest or config was never pulled whole for this platform, and lacks nothing here.
func lacks(ctx context.Context, cs content.Store, sn stat, img images.Image) (l lacking, err error) {
	manifest, err := images.Manifest(ctx, cs, img.Target, platforms.Default())
	if err == nil {
		_, err = cs.Info(ctx, manifest.Config.Digest)
	}
	if errdefs.IsNotFound(err) {
		return l, nil
	}
	if err != nil {
		return l, err
	}
	diffs, err := images.RootFS(ctx, cs, manifest.Config)
	if err != nil {
		return l, err
	}
	l.layers = len(manifest.Layers)
	if len(diffs) != l.layers { // an artifact, not an image
		return l, nil
	}
	for i, chain := range slices.Backward(identity.ChainIDs(slices.Clone(diffs))) {
		switch _, err := sn.Stat(ctx, chain.String()); {
		case err == nil:
			return l, nil // this layer, and all below
		case !errdefs.IsNotFound(err):
			return l, err
		}
		switch _, err := cs.Info(ctx, manifest.Layers[i].Digest); {
		case errdefs.IsNotFound(err):
			l.missing++
		case err != nil:
			return l, err
		}
	}
	return l, nil
}
