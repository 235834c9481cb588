// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// baseOf returns the manifest and the configuration of the image that a container was started from. Of an index it is the manifest whose layers the
// container's snapshot stands on, or else the one that containerd takes by default: some snapshotters give a container with a user namespace a copy of
// the layers.
func baseOf(ctx context.Context, c *client.Client, info containers.Container) (ocispec.Manifest, imageConfig, error) {
	image, err := c.GetImage(ctx, info.Image)
	if err != nil {
		return ocispec.Manifest{}, imageConfig{}, fmt.Errorf("its image: %w", err)
	}
	snapshot, err := c.SnapshotService(info.Snapshotter).Stat(ctx, info.SnapshotKey)
	if err != nil {
		return ocispec.Manifest{}, imageConfig{}, fmt.Errorf("its snapshot: %w", err)
	}
	read := func(platform platforms.MatchComparer) (m ocispec.Manifest, config imageConfig, err error) {
		if m, err = images.Manifest(ctx, c.ContentStore(), image.Target(), platform); err != nil {
			return m, config, fmt.Errorf("its image: %w", err)
		}
		config, err = readConfig(ctx, c.ContentStore(), m.Config)
		return m, config, err
	}
	below := func(config imageConfig) bool {
		return identity.ChainID(slices.Clone(config.RootFS.DiffIDs)).String() == snapshot.Parent
	}
	manifest, config, err := read(image.Platform())
	if err == nil && below(config) {
		return manifest, config, nil
	}
	all, listErr := images.Platforms(ctx, c.ContentStore(), image.Target())
	if listErr != nil {
		all = nil // the default is all there is
	}
	for _, p := range all {
		if m, other, err := read(platforms.OnlyStrict(p)); err == nil && below(other) {
			return m, other, nil
		}
	}
	return manifest, config, err
}
