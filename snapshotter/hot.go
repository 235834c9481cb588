// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"bytes"
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
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/tree"
)

// ContainerSource tells what containers and images are; implemented by
// [pull.Watcher]. Without it no image is known, and no file is hot.
type ContainerSource interface {
	ImageSource
	Config(ctx context.Context, img *pull.Image) (ocispec.Image, error)
	ContainerOf(ctx context.Context, namespace, snapshot string) (pull.Container, error)
	Container(ctx context.Context, namespace, id string) (pull.Container, error)
}

// hotStore is the store as package hif sees it.
type hotStore struct{ *Snapshotter }

func (s hotStore) source() (ContainerSource, error) {
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
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	ids := map[[2]string]string{} // by namespace and chain id
	var namespaces []string
	for _, sn := range all {
		ns := sn.namespace()
		if !slices.Contains(namespaces, ns) {
			namespaces = append(namespaces, ns)
		}
		if sn.Info.Kind == snapshots.KindCommitted && sn.Captured && sn.Damaged == "" {
			ids[[2]string{ns, clientKey(sn.Info.Name)}] = sn.ID
		}
	}
	var images []hif.Image
	for _, ns := range namespaces {
		known, err := source.Images(ctx, ns)
		if err != nil {
			return nil, err
		}
		for _, k := range known {
			if i, whole := hotImage(k, ids); whole {
				images = append(images, i)
			}
		}
	}
	return images, nil
}

func hotImage(k *pull.Image, ids map[[2]string]string) (hif.Image, bool) {
	i := hif.Image{Namespace: k.Namespace, Name: k.Name}
	i.Digest = k.Manifest
	if k.Recorded { // a name made up of where the content came from lacks the registry's port
		i.Repository = hif.Repository(k.Name)
	}
	for _, l := range k.Layers {
		id, ok := ids[[2]string{k.Namespace, l.ChainID.String()}]
		if !ok {
			return i, false
		}
		i.Chain, i.Layers = append(i.Chain, id), append(i.Layers, l.DiffID)
	}
	return i, len(i.Chain) > 0
}

// Config implements [hif.Store].
func (s hotStore) Config(ctx context.Context, image hif.Image) (ocispec.Image, error) {
	source, err := s.source()
	if err != nil {
		return ocispec.Image{}, err
	}
	img, err := s.unpackedImage(ctx, source, image.Namespace, image.Digest.String())
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
	img, err := s.unpackedImage(ctx, source, namespace, c.Image)
	if err != nil {
		return "", "", err
	}
	return img.Manifest, c.Image, nil
}

// Layers implements [hif.Store].
func (s hotStore) Layers(ctx context.Context) ([]plan.Layer, error) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var layers []plan.Layer
	for _, sn := range all {
		if sn.Info.Kind != snapshots.KindCommitted {
			continue
		}
		l := plan.Layer{ID: sn.ID, Tier: sn.Tier, Used: sn.Info.Created}
		l.NVM, _ = sn.bytes()
		switch {
		case sn.Damaged != "":
			l.Fixed = "it has to be rebuilt"
		case !sn.Captured || !sn.Durable:
			l.Fixed = "it is not on its device yet"
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// Files implements [hif.Store].
func (s hotStore) Files(ctx context.Context, image hif.Image, yield func(hif.File) bool) error {
	chain := make(tree.Chain, len(image.Chain))
	for i, id := range image.Chain {
		chain[i] = s.capturePath(id)
	}
	for e, err := range chain.Entries(ctx) {
		if err != nil {
			return err
		}
		if e.Redirect != "" && !yield(hif.File{Path: e.Path, Redirect: e.Redirect, Size: e.Size}) {
			return nil
		}
	}
	return nil
}

// nameOf is the key of a snapshot by its id.
func (s *Snapshotter) nameOf(ctx context.Context, id string) (name string, err error) {
	err = s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return walk(ctx, tx, func(ctx context.Context, info snapshots.Info) error {
			if i, _, _, err := storage.GetInfo(ctx, info.Name); err == nil && i == id {
				name = info.Name
			}
			return nil
		})
	})
	if err == nil && name == "" {
		err = fmt.Errorf("snapshot id %s: %w", id, errdefs.ErrNotFound)
	}
	return name, err
}

// lookPrefix begins the names of directories on which images are mounted for a look.
const lookPrefix = ".view-"

// View implements [hif.Store].
func (s hotStore) View(ctx context.Context, image hif.Image, fn func(dir string) error) (err error) {
	name, err := s.nameOf(ctx, image.Top())
	if err != nil {
		return err
	}
	lower, err := s.tree(ctx, name, image.Top())
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(s.state(), lookPrefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: append([]string{"ro"}, s.lowerOptions(lower, "")...)}
	if err := m.Mount(dir); err != nil {
		return fmt.Errorf("mount image %s to look at it: %w", image.Digest, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0)) }()
	return fn(dir)
}

// Space implements [hif.Store].
func (s hotStore) Space() (plan.Space, error) {
	free, total, err := s.tiers.Space(placement.NVM)
	return plan.Space{Free: free, Total: total, Reserve: s.config.Reserve(total)}, err
}

// Busy implements [migrate.Host].
func (s hotStore) Busy() (why string, busy bool) {
	switch {
	case s.placer.busy():
		return "a pull is being stored", true
	case s.starting():
		return "a container is starting", true
	}
	return "", false
}

// BringHome implements [migrate.Host].
func (s hotStore) BringHome(ctx context.Context, id string, pace func(int) error) error {
	if err := s.homing.bring(ctx, id, pace); err != nil {
		return err
	}
	s.hot.Kick() // only what is at home can be divided into parts
	return nil
}

// Settled implements [migrate.Host].
func (s hotStore) Settled(ctx context.Context, id string, nvmBytes int64) error {
	r, err := s.db.record(ctx, id)
	if err != nil || r.Mixed && r.NVMBytes == nvmBytes {
		return err // a transaction would write to both tiers
	}
	err = s.db.updateRecord(ctx, id, func(r *record) { r.Mixed, r.NVMBytes = true, nvmBytes })
	s.mirror.changed()
	s.letGo(ctx)
	return err
}

// LetGo implements [hif.Store].
func (s hotStore) LetGo(ctx context.Context) { s.letGo(ctx) }

// letGo has the overlays of running containers forget what they have cached of
// files that are not open: an unlinked file holds its space for as long.
func (s *Snapshotter) letGo(ctx context.Context) {
	ours := "lowerdir=" + s.state() + "/"
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
func (s *Snapshotter) watchStart(sn storage.Snapshot, info snapshots.Info, r record, start trace.Start) {
	if s.hot == nil {
		return
	}
	start.Snapshot, start.Layers = sn.ID, slices.Clone(sn.ParentIDs)
	slices.Reverse(start.Layers)
	if sn.Kind == snapshots.KindView {
		start.Upper = ""
	}
	s.hot.Mounted(hif.Start{Start: start, Namespace: r.Namespace, Key: clientKey(info.Name)})
}

// PartsPath implements [hif.Store].
func (s hotStore) PartsPath(top string) string { return s.divided.path(top) }

// PartsChanged implements [hif.Store].
func (s hotStore) PartsChanged(ctx context.Context, top string) error {
	// The chain may have been removed while its parts were made.
	if _, err := s.db.record(ctx, top); errdefs.IsNotFound(err) {
		return s.divided.drop(top)
	}
	return s.divided.changed(ctx, top)
}

// profiles keeps profiles in a bucket of the database.
type profiles struct {
	s      *Snapshotter
	bucket []byte
}

var _ profile.Store = profiles{}

// Get implements [profile.Store].
func (p profiles) Get(image digest.Digest) (data []byte, err error) {
	err = p.s.db.view(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		data = slices.Clone(tx.Bucket(bucketOwn).Bucket(p.bucket).Get([]byte(image)))
		return nil
	})
	return data, err
}

// Update implements [profile.Store].
func (p profiles) Update(image digest.Digest, change func([]byte) ([]byte, error)) error {
	err := p.s.db.update(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		b := tx.Bucket(bucketOwn).Bucket(p.bucket)
		old := slices.Clone(b.Get([]byte(image)))
		data, err := change(old)
		switch {
		case err != nil:
			return err
		case bytes.Equal(data, old):
			return errUnchanged // a commit would sync the file
		case data == nil:
			return b.Delete([]byte(image))
		}
		return b.Put([]byte(image), data)
	})
	if errors.Is(err, errUnchanged) {
		return nil
	}
	if err == nil {
		p.s.mirror.changed()
	}
	return err
}

var errUnchanged = errors.New("nothing to write")

// Each implements [profile.Store].
func (p profiles) Each(f func(digest.Digest, []byte) error) error {
	return p.s.db.view(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Bucket(p.bucket).ForEach(func(k, v []byte) error { return f(digest.Digest(k), v) })
	})
}

func (s *Snapshotter) newHot(ctx context.Context) (err error) {
	if s.config.Hot == nil {
		return nil
	}
	h := hotStore{s}
	s.hot, err = hif.New(ctx, *s.config.Hot, h, h, s.tiers, hif.Books{
		Profiles: profiles{s, bucketProfiles}, Predictions: profiles{s, bucketPredictions}, Origins: profiles{s, bucketOrigins},
	})
	return err
}

// kickHot tells that an image came, or became durable, or went.
func (s *Snapshotter) kickHot() {
	if s.hot != nil {
		s.hot.Kick()
	}
}

// starting tells whether the start of a container is under way.
func (s *Snapshotter) starting() bool { return s.hot != nil && s.hot.Busy() }
