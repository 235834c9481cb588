// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config returns the configuration of an image: what it runs, and its history.
// The text is the image's, and not to be trusted.
func (w *Watcher) Config(ctx context.Context, img *Image) (config ocispec.Image, err error) {
	what := fmt.Sprintf("read config of image %s", img.Manifest)
	c, inner, cancel, err := w.begin(ctx, img.Namespace)
	if err != nil {
		return config, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	// That it is no larger than maxConfig was seen when the manifest was read.
	text, err := content.ReadBlob(inner, c.ContentStore(), img.config)
	if err != nil {
		return config, w.classify(ctx, what, err)
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return config, fmt.Errorf("%s: %w: %w", what, err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// Container is what is known of a container.
type Container struct {
	ID       string
	Image    string // reference, "" where its client did not say
	Snapshot string // key of its snapshot
}

// ContainerOf returns the container in namespace ns that has the given
// snapshot; errdefs.ErrNotFound if there is none (yet, or any more). ctr,
// nerdctl and CRI name a snapshot as its container, so that one is asked for
// first.
func (w *Watcher) ContainerOf(ctx context.Context, ns, snapshot string) (Container, error) {
	what := fmt.Sprintf("find container of snapshot %q in namespace %q", snapshot, ns)
	c, inner, cancel, err := w.begin(ctx, ns)
	if err != nil {
		return Container{}, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	store := c.ContainerService()
	found, err := store.Get(inner, snapshot)
	if err == nil && found.SnapshotKey == snapshot {
		return describe(found), nil
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return Container{}, w.classify(ctx, what, err)
	}
	all, err := store.List(inner)
	if err != nil {
		return Container{}, w.classify(ctx, what, err)
	}
	for _, x := range all {
		if x.SnapshotKey == snapshot {
			return describe(x), nil
		}
	}
	return Container{}, fmt.Errorf("%s: %w", what, errdefs.ErrNotFound)
}

// Container returns a container by its name; errdefs.ErrNotFound without one.
func (w *Watcher) Container(ctx context.Context, ns, id string) (Container, error) {
	what := fmt.Sprintf("find container %q in namespace %q", id, ns)
	c, inner, cancel, err := w.begin(ctx, ns)
	if err != nil {
		return Container{}, fmt.Errorf("%s: %w", what, err)
	}
	defer cancel()
	found, err := c.ContainerService().Get(inner, id)
	if err != nil {
		return Container{}, w.classify(ctx, what, err)
	}
	return describe(found), nil
}

func describe(c containers.Container) Container {
	return Container{ID: c.ID, Image: c.Image, Snapshot: c.SnapshotKey}
}
