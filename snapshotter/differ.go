// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/store"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// Applier is containerd's diff.Applier for snapshots of a Snapshotter. Mounts that are
// not ours are ErrNotImplemented, which has containerd ask the next differ.
func (s *Snapshotter) Applier() diff.Applier { return applier{s} }

type applier struct{ s *Snapshotter }

// Apply waits for the unpacking of a blob and binds its layer to the snapshot
// whose mounts are given.
func (a applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	id, err := a.s.snapshotOf(mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	name, sn, err := a.s.byID(ctx, id)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s to snapshot id %s: %w", desc.Digest, id, err)
	}
	if !isExtraction(name) {
		return a.byPath(ctx, desc, mounts, opts)
	}
	if !unpack.Supports(desc.MediaType) {
		a.s.pulls.written(id, false)
		applied, err := a.byPath(ctx, desc, mounts, opts)
		a.s.pulls.written(id, true)
		if err != nil && ctx.Err() == nil {
			a.s.pulls.broke(id, err)
		}
		return applied, err
	}
	l, err := a.unpacked(ctx, id, sn, desc)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: l.Tar}, nil
}

// unpacked waits for the layer of a blob and binds it.
func (a applier) unpacked(ctx context.Context, id string, sn store.Snapshot, desc ocispec.Descriptor) (store.Layer, error) {
	spec, ok := a.s.pulls.spec(id, sn)
	if !ok || spec.Blob != desc.Digest {
		ns, err := namespaces.NamespaceRequired(ctx)
		if err != nil {
			return store.Layer{}, err
		}
		spec = store.Spec{Namespace: ns, Blob: desc.Digest, Size: desc.Size, MediaType: desc.MediaType}
	}
	layer, _, err := a.s.store.Begin(ctx, spec)
	if err != nil {
		return store.Layer{}, err
	}
	defer a.s.store.Release(layer)
	l, err := a.s.store.Await(ctx, layer)
	if err != nil {
		if ctx.Err() == nil {
			a.s.pulls.broke(id, err)
		}
		return store.Layer{}, err
	}
	var changed []store.LayerID
	err = a.s.store.UpdateTx(ctx, func(_ context.Context, tx *bolt.Tx) error {
		changed, err = a.s.store.Bind(tx, id, layer)
		return err
	})
	if err != nil {
		return store.Layer{}, err
	}
	a.s.store.Bound(changed)
	a.s.pulls.applied(id)
	return l, nil
}

// byPath has containerd's own applier write to the mounts: the snapshot is not
// one that a layer is unpacked into, or the blob is of a type that needs a stream
// processor. Without one for it the error is not ErrNotImplemented, at which
// containerd's transfer service says that it cannot pull at all.
func (a applier) byPath(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts []diff.ApplyOpt) (ocispec.Descriptor, error) {
	if p := a.s.config.Processors; !unpack.Supports(desc.MediaType) && (p == nil || !p(desc.MediaType)) {
		// containerd's applier would take many of them for plain tar (images.DiffCompression).
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: layers of type %q need a program: name it under [stream_processors] of nhybrid's configuration, or have containerd unpack such images by itself (differ = \"walking\"): %w",
			desc.Digest, desc.MediaType, errdefs.ErrFailedPrecondition)
	}
	if a.s.config.Downloads == nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: no containerd is configured: %w", desc.Digest, errdefs.ErrUnavailable)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	provider, err := a.s.config.Downloads.Provider(ctx, ns)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	log.G(ctx).WithField("media_type", desc.MediaType).Debug("a blob is applied by path")
	return apply.NewFileSystemApplier(provider).Apply(ctx, desc, mounts, opts...)
}

// errForeign says that mounts belong to another snapshotter.
var errForeign = fmt.Errorf("these mounts are not of nhybrid: %w", errdefs.ErrNotImplemented)

// snapshotOf finds the snapshot of which Prepare has returned the mounts.
func (s *Snapshotter) snapshotOf(mounts []mount.Mount) (id string, err error) {
	if len(mounts) == 0 {
		return "", errForeign
	}
	upper := mounts[0].Source
	if mounts[0].Type == "overlay" {
		upper = ""
		for _, o := range mounts[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = dir
			}
		}
	}
	for _, t := range tier.Tiers {
		if rel, err := filepath.Rel(s.store.Tiers.StagingRoot(t), upper); err == nil {
			if id, rest, _ := strings.Cut(rel, "/"); rest == "fs" && id != ".." {
				return id, nil
			}
		}
	}
	return "", errForeign
}

// byID finds an active snapshot by its id.
func (s *Snapshotter) byID(ctx context.Context, id string) (name string, sn store.Snapshot, err error) {
	err = s.store.ViewTx(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if sn, err = store.GetSnapshot(tx, id); err != nil {
			return err
		}
		if sn.Key != "" {
			got, info, _, err := storage.GetInfo(ctx, sn.Key)
			if err == nil && got == id && info.Kind == snapshots.KindActive {
				name = sn.Key
				return nil
			}
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
		return fmt.Errorf("it is not active: %w", errdefs.ErrFailedPrecondition)
	})
	return name, sn, err
}
