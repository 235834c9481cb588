// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/tree"
)

// largeLayer is from how many entries on memory is given back to the system
// right after use. A daemon that idles for weeks should not look like one that
// merges a tree (300 bytes an entry).
const largeLayer = 50_000

// patience is how long a call waits for background work. containerd holds a
// lock of the snapshotter meanwhile, for which its garbage collection waits,
// and for that everybody else (containerd#13798).
const patience = 20 * time.Second

// bounded runs fn, which waits for background work, for at most patience. The
// work itself goes on.
func (s *Snapshotter) bounded(ctx context.Context, fn func(context.Context) error) error {
	inner, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := fn(inner)
	if err != nil && inner.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("not ready after %s, the work goes on; try again: %w", patience, errdefs.ErrUnavailable)
	}
	return err
}

// settle starts the background work that follows a commit.
func (s *Snapshotter) settle(id, name string) {
	s.jobs.addUntilDone("capture "+id, s.capture(id, name), func(error) bool { return true })
}

// capturePath is where the metadata of a layer stand.
func (s *Snapshotter) capturePath(id string) string { return s.path("m", id) }

// captured waits until the metadata of the named layer are captured.
func (s *Snapshotter) captured(ctx context.Context, name string) error {
	var id string
	var r record
	err := s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if id, _, _, err = storage.GetInfo(ctx, name); err != nil {
			return err
		}
		r, err = getRecord(tx, id)
		return err
	})
	if err != nil {
		return err
	}
	if r.Damaged != "" {
		if err := s.jobs.do(ctx, "repair "+id, s.repair(id, name)); err != nil {
			return err
		}
	}
	if r.Captured && r.Damaged == "" {
		return nil
	}
	return s.jobs.do(ctx, "capture "+id, s.capture(id, name))
}

// capture walks the directory of a committed layer once and writes down its
// metadata. What follows from it is queued: the sync that makes the layer
// durable, and the tree if the layer is the top of an image.
func (s *Snapshotter) capture(id, name string) func(context.Context) error {
	return func(ctx context.Context) error {
		r, err := s.db.record(ctx, id)
		if errdefs.IsNotFound(err) || r.Captured {
			return nil // removed, or done before
		}
		if err != nil {
			return err
		}
		if r.Damaged != "" {
			return nil // the repair captures it
		}
		stats, err := s.writeCapture(ctx, id, name, r)
		if err != nil {
			return fmt.Errorf("capture metadata of layer %q: %w", name, err)
		}
		err = s.db.updateRecord(ctx, id, func(r *record) {
			r.Captured, r.Files, r.Data = true, stats.Files, stats.DataBytes
			r.Usage = snapshots.Usage{Size: stats.Bytes, Inodes: stats.Inodes}
		})
		if err != nil {
			return err
		}
		if err := s.tiers.Unstage(id); err != nil {
			log.G(ctx).WithError(err).Warn("could not clear staging directory")
		}
		if r.MaxSize > 0 {
			s.quota.forget(id) // what is committed does not grow
		}
		if _, err := s.db.record(ctx, id); errdefs.IsNotFound(err) {
			return os.Remove(s.capturePath(id)) // removed meanwhile
		}
		s.mirror.changed()
		s.syncer.add(id, name, r.Tier, stats.DataBytes)
		if s.isTop(ctx, name, r) {
			s.jobs.add("tree "+id, s.buildTree(id, name))
			s.kickHot()
		}
		if stats.Entries > largeLayer {
			debug.FreeOSMemory()
		}
		log.G(ctx).WithFields(log.Fields{"id": id, "entries": stats.Entries, "bytes": stats.DataBytes}).Debug("captured")
		return nil
	}
}

func (s *Snapshotter) writeCapture(ctx context.Context, id, name string, r record) (stats tree.Stats, err error) {
	chain, err := s.parentCaptures(ctx, name)
	if err != nil {
		return stats, err
	}
	tmp := s.path("m", "."+id)
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return stats, err
	}
	stats, err = tree.Capture(ctx, s.tiers.Data(r.Tier, id), id, chain, f)
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = os.Rename(tmp, s.capturePath(id))
	}
	if err != nil {
		os.Remove(tmp)
	}
	return stats, err
}

// parentCaptures are the captures of all layers below the named one. Upper
// directories of containers may refer to them.
func (s *Snapshotter) parentCaptures(ctx context.Context, name string) (tree.Chain, error) {
	var parent string
	err := s.db.view(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		_, info, _, err := storage.GetInfo(ctx, name)
		parent = info.Parent
		return err
	})
	if err != nil || parent == "" {
		return nil, err
	}
	return s.captures(ctx, parent)
}

// intact makes sure that no layer of a chain is damaged, and has repaired those that are.
func (s *Snapshotter) intact(ctx context.Context, name string) error {
	layers, err := s.db.lineage(ctx, name)
	if err != nil {
		return err
	}
	for _, l := range layers {
		if l.Damaged == "" {
			continue
		}
		if err := s.jobs.do(ctx, "repair "+l.ID, s.repair(l.ID, l.Info.Name)); err != nil {
			return err
		}
	}
	return nil
}

// captures are the capture files of the chain that ends in the named layer,
// bottom first; missing ones are made.
func (s *Snapshotter) captures(ctx context.Context, name string) (tree.Chain, error) {
	layers, err := s.db.lineage(ctx, name)
	if err != nil {
		return nil, err
	}
	slices.Reverse(layers)
	c := make(tree.Chain, len(layers))
	for i, l := range layers {
		if err := s.captured(ctx, l.Info.Name); err != nil {
			return nil, err
		}
		c[i] = s.capturePath(l.ID)
	}
	return c, nil
}

// isTop tells whether containers are likely to run from the layer: it is the
// last of its image, or nobody knows its image and nothing stands on it.
func (s *Snapshotter) isTop(ctx context.Context, name string, r record) bool {
	if r.Image != nil {
		return r.Image.Index == r.Image.Layers-1
	}
	children := false
	err := s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return walk(ctx, tx, func(_ context.Context, info snapshots.Info) error {
			children = children || info.Parent == name
			return nil
		})
	})
	return err == nil && !children
}

// tree returns the mount point of the tree of the chain that ends in the named
// layer, and mounts it first where it is not.
func (s *Snapshotter) tree(ctx context.Context, name, id string) (string, error) {
	dir := s.state("t", id)
	if isErofs(dir) {
		return dir, nil
	}
	err := s.bounded(ctx, func(ctx context.Context) error {
		return s.jobs.do(ctx, "tree "+id, s.buildTree(id, name))
	})
	if err != nil {
		return "", err
	}
	if !isErofs(dir) {
		return "", fmt.Errorf("tree of layer %q is not mounted on %q: %w", name, dir, errdefs.ErrUnavailable)
	}
	return dir, nil
}

// treeImages are the places where the image of a tree may stand: NVM, or HDD
// when NVM was full.
func (s *Snapshotter) treeImages(id string) []string {
	return []string{filepath.Join(s.tiers.Root(placement.NVM), "t", id+".erofs"), s.path("t", id+".erofs")}
}

// buildTree merges the captures of a chain into an image, unless a good one is
// there, and mounts it.
func (s *Snapshotter) buildTree(id, name string) func(context.Context) error {
	return func(ctx context.Context) error {
		if _, err := s.db.record(ctx, id); errdefs.IsNotFound(err) {
			return fmt.Errorf("layer %q: %w", name, errdefs.ErrNotFound)
		}
		dir := s.state("t", id)
		if isErofs(dir) {
			return nil
		}
		// A good tree over damaged data would serve what the crash left.
		if err := s.intact(ctx, name); err != nil {
			return err
		}
		image, err := s.treeImage(ctx, id, name)
		if err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("create mount point: %w", err)
		}
		options := []string{"ro"}
		if s.features.UseLoop() {
			options = append(options, "loop")
		}
		m := mount.Mount{Type: "erofs", Source: image, Options: options}
		if err := m.Mount(dir); err != nil {
			return fmt.Errorf("mount tree %q: %w", image, err)
		}
		if _, err := s.db.record(ctx, id); errdefs.IsNotFound(err) { // removed meanwhile
			return errors.Join(unmount(dir), os.Remove(image), fmt.Errorf("layer %q: %w", name, errdefs.ErrNotFound))
		}
		return nil
	}
}

func (s *Snapshotter) treeImage(ctx context.Context, id, name string) (string, error) {
	for _, image := range s.treeImages(id) {
		err := tree.VerifyImage(image)
		if err == nil {
			return image, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("image", image).Warn("tree image is unusable, building it again")
		}
	}
	chain, err := s.captures(ctx, name)
	if err != nil {
		return "", err
	}
	images := s.treeImages(id)
	if free, total, err := s.tiers.Space(placement.NVM); err != nil || free <= s.config.Reserve(total) {
		images = images[1:] // NVM is full but for its reserve
	}
	for _, image := range images {
		err = writeTree(ctx, chain, image)
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return image, err
		}
		log.G(ctx).WithError(err).WithField("image", image).Warn("no room for a tree, trying the HDD")
	}
	return "", err
}

// writeTree makes the image of a tree; what is found under its name after a
// crash is whole.
func writeTree(ctx context.Context, c tree.Chain, path string) error {
	err := tier.WriteFile(path, func(f *os.File) error {
		stats, err := tree.Write(ctx, c, f)
		if stats.Entries > largeLayer {
			debug.FreeOSMemory()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write tree %q: %w", path, err)
	}
	return nil
}

// removal deletes what stands of a removed snapshot.
func (s *Snapshotter) removal(id string) func(context.Context) error {
	return func(ctx context.Context) error {
		if _, err := s.db.record(ctx, id); !errdefs.IsNotFound(err) {
			if err == nil { // an id that lives is nobody's garbage
				err = s.db.forgetRemoved(ctx, id)
			}
			return err
		}
		err := errors.Join(s.dropIDMapped(id), unmount(s.state("t", id)), s.divided.drop(id))
		if err == nil {
			for _, f := range append(s.treeImages(id), s.capturePath(id)) {
				if e := os.Remove(f); e != nil && !errors.Is(e, os.ErrNotExist) {
					err = errors.Join(err, e)
				}
			}
		}
		if err == nil {
			err = s.tiers.Remove(id)
		}
		if err != nil {
			return fmt.Errorf("remove files of snapshot id %s: %w", id, err)
		}
		s.quota.forget(id)
		return s.db.forgetRemoved(ctx, id)
	}
}
