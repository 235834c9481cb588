// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// largeLayer is from how many entries on memory is given back to the system
// right after use. A daemon that idles for weeks should not look like one that
// merges a view.
const largeLayer = 50_000

// views makes and mounts the views of chains, by the snapshot at their top.
type views struct {
	s *Store
	// slots bounds the merges at a time: after a loss of NVM each pod of a node asks for one.
	slots chan struct{}
	write func(context.Context, pack.Chain, map[uint64]uint32, string) error // writeView, but for tests

	mu    sync.Mutex
	parts parts // of large files, see parts.go
	// ahead is how far the kernel reads ahead on the views that this process has mounted. The kernel does not tell of a mount
	// which entry in sysfs is its own.
	ahead map[string]erofs.ReadAhead
}

func newViews(s *Store) *views {
	return &views{s: s, ahead: map[string]erofs.ReadAhead{}, slots: make(chan struct{}, s.config.Workers), write: writeView, parts: parts{unable: partsUnable(s.features)}}
}

// Chain is the layers below and at a committed snapshot, bottom first.
func (s *Store) Chain(ctx context.Context, name string) (ids []LayerID, err error) {
	err = s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		ids, err = chain(ctx, tx, name)
		return err
	})
	return ids, err
}

// ChainBelow is the layers below a snapshot, bottom first, in a transaction.
func ChainBelow(ctx context.Context, tx *bolt.Tx, name string) ([]LayerID, error) {
	e, err := entry(ctx, tx, name)
	if err != nil || e.Info.Parent == "" {
		return nil, err
	}
	return chain(ctx, tx, e.Info.Parent)
}

func chain(ctx context.Context, tx *bolt.Tx, name string) (ids []LayerID, err error) {
	for name != "" {
		e, err := entry(ctx, tx, name)
		if err != nil {
			return nil, err
		}
		if e.Info.Kind != snapshots.KindCommitted || e.Layer == 0 {
			return nil, fmt.Errorf("snapshot %q has no layer: %w", name, errdefs.ErrFailedPrecondition)
		}
		ids = append(ids, e.Layer)
		name = e.Info.Parent
	}
	slices.Reverse(ids)
	return ids, nil
}

// View returns the mount point of the view of the chain that ends in the
// committed snapshot called name, with the given id. It waits for the layers and
// for the view itself. The tree is in its directory t, the data by number in h.
func (s *Store) View(ctx context.Context, id, name string) (string, error) {
	point := s.StatePath("v", id)
	if pack.Mounted(point) {
		return point, nil
	}
	err := s.jobs.do(ctx, "view "+id, func(ctx context.Context) error { return s.views.build(ctx, id, name) })
	if err != nil {
		return "", err
	}
	if !pack.Mounted(point) {
		return "", fmt.Errorf("view of %q is not mounted on %q: %w", name, point, errdefs.ErrUnavailable)
	}
	return point, nil
}

// ViewLater has the view made in the background: a container may ask for it soon.
func (s *Store) ViewLater(id, name string) {
	s.jobs.add("view "+id, func(ctx context.Context) error {
		err := s.views.build(ctx, id, name)
		if errdefs.IsNotFound(err) {
			return nil // removed meanwhile
		}
		return err
	})
}

// viewImages are the places where the image of a view may stand: NVM, or HDD
// when NVM was full.
func (s *Store) viewImages(id string) []string {
	return []string{filepath.Join(s.Tiers.Root(placement.NVM), "v", id+".erofs"), s.path("v", id+".erofs")}
}

// build makes the image of a view, unless a good one is there, and mounts it.
func (v *views) build(ctx context.Context, id, name string) error {
	s := v.s
	point := s.StatePath("v", id)
	if pack.Mounted(point) {
		return nil
	}
	chain, err := s.Chain(ctx, name)
	if err != nil {
		return err
	}
	for _, l := range chain {
		if _, err := s.Await(ctx, l); err != nil {
			return err
		}
	}
	image, err := v.image(ctx, id, chain)
	if err != nil {
		return err
	}
	packs, err := v.packs(image)
	if err != nil {
		return err
	}
	if err := os.Mkdir(point, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("create mount point: %w", err)
	}
	ahead, err := pack.MountView(image, point, packs, s.features.UseLoop())
	if err != nil {
		return fmt.Errorf("mount view %q: %w", image, err)
	}
	v.mounted(id, ahead)
	if _, err := s.Chain(ctx, name); errdefs.IsNotFound(err) { // removed meanwhile
		return errors.Join(unmount(point), os.Remove(image), err)
	}
	return nil
}

// packs are the devices of a view.
func (v *views) packs(image string) (paths []string, err error) {
	devices, err := pack.ViewDevices(image)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		paths = append(paths, v.s.PackPath(LayerID(d)))
	}
	return paths, nil
}

func (v *views) image(ctx context.Context, id string, chain []LayerID) (string, error) {
	s := v.s
	images := s.viewImages(id)
	for _, image := range images {
		err := pack.VerifyViewDeep(image)
		if err == nil {
			return image, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("image", image).Warn("the image of a view is unusable and is made again")
		}
	}
	select {
	case v.slots <- struct{}{}:
		defer func() { <-v.slots }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	metas, blocks, err := s.metas(ctx, chain)
	if err != nil {
		return "", err
	}
	if room, err := s.Room(placement.NVM); err != nil || room.Full() {
		images = images[1:] // NVM is full but for its reserve
	}
	for _, image := range images {
		err = v.write(ctx, metas, blocks, image)
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return image, err
		}
		log.G(ctx).WithError(err).WithField("image", image).Warn("no room for a view")
	}
	return "", err
}

// writeView makes an image that has its name when it is whole. It is not synced:
// it is made again from the packs where a power cut tears it, which its checksum shows.
func writeView(ctx context.Context, c pack.Chain, blocks map[uint64]uint32, path string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*.tmp")
	if err != nil {
		return fmt.Errorf("write view: %w", err)
	}
	stats, err := pack.WriteView(ctx, c, blocks, f)
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write view %q: %w", path, err)
	}
	if stats.Entries > largeLayer {
		debug.FreeOSMemory()
	}
	return nil
}

// ViewImage is the image of a view and its tier. Where it is yet to be made, that is where it will stand if there is room.
func (s *Store) ViewImage(id string) (string, placement.Tier) {
	images := s.viewImages(id)
	if _, err := os.Stat(images[0]); err != nil {
		if _, err := os.Stat(images[1]); err == nil {
			return images[1], placement.HDD
		}
	}
	return images[0], placement.NVM
}

// ViewBytes is the size of the image of a view by tier, 0 for none.
func (s *Store) ViewBytes(id string) (out [2]int64) {
	for i, t := range []placement.Tier{placement.NVM, placement.HDD} {
		if st, err := os.Stat(s.viewImages(id)[i]); err == nil {
			out[t] = st.Size()
		}
	}
	return out
}

// unmount takes a mount point away, also while something still looks into it.
func unmount(dir string) error {
	if pack.Mounted(dir) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %q: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}
