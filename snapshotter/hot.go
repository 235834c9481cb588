// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/operator"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// ContainerSource tells what containers and images are; implemented by
// [pull.Watcher]. Without it no image is known, and no file is hot.
type ContainerSource interface {
	operator.Source
	Config(ctx context.Context, img *pull.Image) (ocispec.Image, error)
	ContainerOf(ctx context.Context, namespace, snapshot string) (pull.Container, error)
}

// hotStore is the store as package hif sees it.
type hotStore struct {
	*Snapshotter
	pins *tier.Pins
}

var (
	_ hif.Store    = hotStore{}
	_ migrate.Host = hotStore{}
)

func (s *Snapshotter) source() (ContainerSource, error) {
	c, ok := s.config.Downloads.(ContainerSource)
	if !ok {
		return nil, fmt.Errorf("no containerd is configured: %w", errdefs.ErrUnavailable)
	}
	return c, nil
}

// Images implements [hif.Store].
func (s hotStore) Images(ctx context.Context) ([]hif.Image, error) {
	source, err := s.source()
	if err != nil {
		return nil, err
	}
	all, err := s.store.Entries(ctx)
	if err != nil {
		return nil, err
	}
	entries := map[[2]string]store.Entry{} // by namespace and chain id
	var namespaces []string
	for _, e := range all {
		ns := e.NS()
		if !slices.Contains(namespaces, ns) {
			namespaces = append(namespaces, ns)
		}
		if e.Of != nil && e.Of.State.Valid() && e.Of.Damaged == "" {
			entries[[2]string{ns, store.ClientKey(e.Info.Name)}] = e
		}
	}
	var images []hif.Image
	for _, ns := range namespaces {
		known, err := source.Images(ctx, ns)
		if err != nil {
			return nil, err
		}
		for _, k := range known {
			if i, whole := hotImage(k, entries); whole {
				images = append(images, i)
			}
		}
	}
	return images, nil
}

func hotImage(k *pull.Image, entries map[[2]string]store.Entry) (hif.Image, bool) {
	i := hif.Image{Image: arriving(k).Image, Namespace: k.Namespace, Name: k.Name}
	for _, l := range k.Layers {
		e, ok := entries[[2]string{k.Namespace, l.ChainID.String()}]
		if !ok {
			return i, false
		}
		i.View, i.Chain = e.ID, append(i.Chain, e.Layer.String())
	}
	return i, len(i.Chain) > 0
}

// arriving is an image as hif sees it before its layers are here.
func arriving(k *pull.Image) (a hif.Arriving) {
	a.Name, a.Digest = k.Name, k.Manifest
	if k.Recorded { // a name made up of where the content came from lacks the registry's port
		a.Repository = hif.Repository(k.Name)
	}
	for _, l := range k.Layers {
		a.Layers = append(a.Layers, l.DiffID)
	}
	return a
}

// Config implements [hif.Store].
func (s hotStore) Config(ctx context.Context, image hif.Image) (ocispec.Image, error) {
	source, err := s.source()
	if err != nil {
		return ocispec.Image{}, err
	}
	img, err := operator.Unpacked(ctx, s.store, source, image.Namespace, image.Digest.String())
	if err != nil {
		return ocispec.Image{}, err
	}
	return source.Config(ctx, img)
}

// ImageOf implements [hif.Store].
func (s hotStore) ImageOf(ctx context.Context, namespace, snapshot string) (image digest.Digest, name string, err error) {
	source, err := s.source()
	if err != nil {
		return "", "", err
	}
	c, err := source.ContainerOf(ctx, namespace, snapshot)
	if err != nil {
		return "", "", err
	}
	img, err := operator.Unpacked(ctx, s.store, source, namespace, c.Image)
	if err != nil {
		return "", "", err
	}
	return img.Manifest, c.Image, nil
}

// Layers implements [hif.Store].
func (s hotStore) Layers(context.Context) ([]plan.Layer, error) {
	var layers []plan.Layer
	for _, l := range s.store.Layers() {
		if l.Users == 0 || l.State == store.Unpacking || l.State == store.Staged {
			continue
		}
		// Holes says where files went when the layer was stored, also when they are filled.
		p := plan.Layer{ID: l.ID.String(), Tier: placement.HDD, Waiting: l.Holes > 0, Used: l.Created, NVM: l.NVM}
		if l.State != store.Home {
			p.Tier = placement.NVM
		}
		switch {
		case l.Damaged != "":
			p.Fixed = "it has to be unpacked anew"
		case l.State == store.Stored:
			p.Fixed = "it is not on its device yet"
		}
		layers = append(layers, p)
	}
	return layers, nil
}

// Files implements [hif.Store].
func (s hotStore) Files(ctx context.Context, image hif.Image, yield func(hif.File) bool) error {
	var ids []store.LayerID
	for _, id := range image.Chain {
		ref, err := pack.ParseRedirect("/" + id + "/01/1")
		if err != nil {
			return fmt.Errorf("layer %q of image %s: %w", id, image.Digest, errdefs.ErrInvalidArgument)
		}
		ids = append(ids, store.LayerID(ref.Layer))
	}
	chain, err := s.store.Metas(ctx, ids)
	if err != nil {
		return err
	}
	first := firstNames{chain: chain}
	for e, err := range chain.Entries(ctx) {
		if err != nil {
			return err
		}
		if !e.HasData() {
			continue
		}
		if !yield(hif.File{Path: e.Path, InLayer: first.of(e), Redirect: e.Data.Redirect(), Size: e.Size}) {
			return nil
		}
	}
	return nil
}

// firstNames tells the first names of files in the layers that hold their data.
// For nearly all files that is the visible name.
type firstNames struct {
	chain pack.Chain
	names map[pack.Ref]string
}

func (f *firstNames) of(e pack.Entry) string {
	if e.Inode.Nlink <= 1 && e.Data.Layer == e.Layer {
		return strings.TrimPrefix(e.Path, "/")
	}
	if f.names == nil {
		f.names = map[pack.Ref]string{}
		for _, m := range f.chain {
			m.EachFile(func(path string, i *pack.Inode) {
				if _, ok := f.names[i.Data]; !ok && i.Data.Layer == m.Layer {
					f.names[i.Data] = path
				}
			})
		}
	}
	return f.names[e.Data]
}

// View implements [hif.Store].
func (s hotStore) View(ctx context.Context, image hif.Image, fn func(dir string) error) (err error) {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(e store.Entry) bool { return e.ID == image.View })
	if i < 0 {
		return fmt.Errorf("snapshot id %s: %w", image.View, errdefs.ErrNotFound)
	}
	view, err := s.view(ctx, all[i].Info.Name, image.View)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(s.store.StatePath(), store.LookPrefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: append([]string{"ro"}, s.lowerOptions(treeOf(view), "", homeOf(view))...)}
	if err := m.Mount(dir); err != nil {
		return fmt.Errorf("mount image %s to look at it: %w", image.Digest, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0)) }()
	return fn(dir)
}

// DataRoot implements [hif.Store].
func (s hotStore) DataRoot() string { return s.store.Tiers.DataRoot() }

// PackPath implements [hif.Store].
func (s hotStore) PackPath(layer uint64) string { return s.store.PackPath(store.LayerID(layer)) }

// PackFile implements [hif.Store].
func (s hotStore) PackFile(ref pack.Ref) (block uint32, size int64, err error) {
	return s.store.PackFile(ref)
}

// Space implements [hif.Store].
func (s hotStore) Space() (plan.Space, error) { return operator.Space(s.store) }

// PartsPath implements [hif.Store].
func (s hotStore) PartsPath(view string) string { return s.store.PartsPath(view) }

// PartsChanged implements [hif.Store].
func (s hotStore) PartsChanged(ctx context.Context, view string) error {
	// The chain may have been removed while its parts were made.
	if ok, err := s.store.HasSnapshot(ctx, view); err != nil || !ok {
		return errors.Join(err, s.store.DropParts(view))
	}
	return s.store.PartsChanged(ctx, view)
}

// StartBegins implements [hif.Store].
func (s hotStore) StartBegins(ctx context.Context, view string, layers []string) {
	chain := make([]store.LayerID, 0, len(layers))
	for _, l := range layers {
		if id, err := store.ParseLayerID(l); err == nil { // it is what watchStart has written
			chain = append(chain, id)
		}
	}
	s.store.StartBegins(ctx, view, chain)
}

// StartsEnded implements [hif.Store].
func (s hotStore) StartsEnded(ctx context.Context, view string) { s.store.StartsEnded(ctx, view) }

// LetGo implements [hif.Store].
func (s hotStore) LetGo(ctx context.Context) { s.letGo(ctx) }

// letGo has the overlays of running containers forget what they have cached of
// files that are not open: an unlinked file holds its space for as long. Without
// xino=on the directories of running containers would get other inode numbers by
// that, at which tar, rm and find give up.
func (s *Snapshotter) letGo(ctx context.Context) {
	if !s.config.Xino {
		return
	}
	ours := "lowerdir=" + s.store.StatePath() + "/"
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "overlay" || !strings.Contains(m.VFSOptions, ours), false
	})
	for _, m := range mounts {
		if e := tier.LetGo(m.Mountpoint); e != nil && !errors.Is(e, os.ErrNotExist) { // gone meanwhile
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Debug("containers may hold space of files that left NVM")
	}
}

// watchStart has the start of a container traced.
func (s *Snapshotter) watchStart(ctx context.Context, sn storage.Snapshot, info snapshots.Info, r store.Snapshot, start trace.Start) error {
	if s.hot == nil {
		return nil
	}
	chain, err := s.store.Chain(ctx, info.Parent)
	if err != nil {
		return err
	}
	start.Snapshot = sn.ID
	for _, id := range chain {
		start.Layers = append(start.Layers, id.String())
	}
	if sn.Kind == snapshots.KindView {
		start.Upper = ""
	}
	s.hot.Mounted(hif.Start{Start: start, View: sn.ParentIDs[0], Namespace: r.Namespace, Key: store.ClientKey(info.Name)})
	return nil
}

// kickHot tells that an image came, or became durable, or went.
func (s *Snapshotter) kickHot() {
	if s.hot != nil {
		s.hot.Kick()
	}
}

// starting reports whether the start of a container is under way.
func (s *Snapshotter) starting() bool { return s.hot != nil && s.hot.Busy() }
