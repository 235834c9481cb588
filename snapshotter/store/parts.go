// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	hifparts "github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// parts is what views know of the touched parts of large files (package
// hif/parts): one image and mount for each chain, by the snapshot at its top.
type parts struct {
	// unable is why this kernel, or this NVM, mounts none; nil: it may. Guarded by views.mu.
	unable error
}

func partsUnable(f host.Features) error {
	if f.FileBacked && !f.UseLoop() {
		return nil
	}
	return fmt.Errorf("parts of files need EROFS from a file below an overlay of a container (Linux 6.12): %w", errdefs.ErrNotImplemented)
}

func (s *Store) partsImage(id string) string {
	return filepath.Join(s.Tiers.Root(placement.NVM), "parts", id+".erofs")
}

func (s *Store) partsPoint(id string) string { return s.StatePath("p", id) }

// Parts returns the mount point of the parts of a chain, "" if there are none. It
// never fails: without, files are read from their packs.
func (s *Store) Parts(ctx context.Context, id string) string {
	image, point := s.partsImage(id), s.partsPoint(id)
	if _, err := os.Lstat(image); err != nil {
		return ""
	}
	// Before the lock: nobody waits while parts of another chain are mounted.
	if hifparts.Mounted(point) {
		return point
	}
	v := s.views
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.parts.unable != nil {
		return ""
	}
	if hifparts.Mounted(point) {
		return point
	}
	if err := v.mountParts(ctx, image, point); err != nil {
		return ""
	}
	return point
}

// mountParts mounts parts anew. What can never be used goes: it is made again.
// Called with mu held.
func (v *views) mountParts(ctx context.Context, image, point string) error {
	err := hifparts.Mount(image, point, v.s.packPath)
	switch {
	case err == nil:
		return nil
	case errdefs.IsNotImplemented(err):
		v.parts.unable = err
		log.G(ctx).WithError(err).Warn("hot files stay whole")
	default:
		log.G(ctx).WithError(err).Warn("parts of large files cannot be used; they are made again")
	}
	return errors.Join(err, hifparts.Detach(point), os.Remove(image))
}

func (s *Store) packPath(layer uint64) string { return s.PackPath(LayerID(layer)) }

// PartsPath is where the parts of a chain are to be made, "" where they cannot be mounted.
func (s *Store) PartsPath(id string) string {
	s.views.mu.Lock()
	defer s.views.mu.Unlock()
	if s.views.parts.unable != nil {
		return ""
	}
	return s.partsImage(id)
}

// PartsChanged mounts what stands at [Store.PartsPath] now, for who comes next.
// The mount point stays as long as the chain does: a container may have been told
// to mount it a moment ago.
func (s *Store) PartsChanged(ctx context.Context, id string) error {
	s.views.mu.Lock()
	defer s.views.mu.Unlock()
	if _, err := os.Lstat(s.partsImage(id)); err != nil {
		return hifparts.Detach(s.partsPoint(id))
	}
	return s.views.mountParts(ctx, s.partsImage(id), s.partsPoint(id))
}

// DropParts takes the parts of a chain away that is gone: mount, mount point and image.
func (s *Store) DropParts(id string) error { return s.dropParts(id, hifparts.Unmount) }

func (s *Store) dropParts(id string, unmount func(point string) error) error {
	s.views.mu.Lock()
	defer s.views.mu.Unlock()
	err := unmount(s.partsPoint(id))
	if e := os.Remove(s.partsImage(id)); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// PartsBytes tells how much of each file of a chain stands on NVM in parts, by redirect.
func (s *Store) PartsBytes(id string) map[string]int64 {
	set, err := hifparts.Read(s.partsImage(id))
	if err != nil {
		return nil
	}
	out := make(map[string]int64, len(set.Files))
	for _, f := range set.Files {
		out[f.Redirect] = f.Bytes()
	}
	return out
}

// forget mounts every view of a layer anew and takes down all parts that read from
// it, so that the next container sees its new pack. Running containers keep what
// they have mounted. A container may have been told to mount the view or the parts
// a moment ago: a view, or the bare mount point of parts, is there all the time.
func (v *views) forget(ctx context.Context, id LayerID) error {
	s := v.s
	var err error
	points, _ := filepath.Glob(s.StatePath("v", "*")) // fails for a bad pattern only
	for _, point := range points {
		view := filepath.Base(point)
		for _, image := range s.viewImages(view) {
			devices, e := pack.ViewDevices(image)
			if e == nil && slices.Contains(devices, uint64(id)) {
				log.G(ctx).WithField("view", view).Debug("a view is mounted anew for a layer that was unpacked anew")
				if e := v.remount(view, image, point); e != nil {
					// The next container makes it anew; one that was told to mount it a moment ago fails.
					log.G(ctx).WithError(e).WithField("view", view).Warn("a view cannot be mounted anew")
					err = errors.Join(err, unmount(point))
				}
				break
			}
		}
	}
	images, _ := filepath.Glob(s.partsImage("*"))
	for _, image := range images {
		set, e := hifparts.Read(image)
		of := func(f hifparts.File) bool { return strings.HasPrefix(f.Redirect, "/"+id.String()+"/") }
		if e != nil || slices.ContainsFunc(set.Files, of) {
			err = errors.Join(err, s.dropParts(strings.TrimSuffix(filepath.Base(image), ".erofs"), hifparts.Detach))
		}
	}
	return err
}

func (v *views) remount(id, image, point string) error {
	if !pack.Mounted(point) {
		return nil // the next container mounts it
	}
	packs, err := v.packs(image)
	if err != nil {
		return err
	}
	ahead, err := pack.RemountView(image, point, packs, v.s.features.UseLoop())
	if err != nil {
		return err
	}
	v.mounted(id, ahead)
	return nil
}

// recoverParts unmounts what is not what stands on NVM: the daemon died between
// writing parts and mounting them.
func (v *views) recoverParts(ctx context.Context) {
	points, _ := filepath.Glob(v.s.partsPoint("*"))
	for _, point := range points {
		if hifparts.Current(v.s.partsImage(filepath.Base(point)), point) {
			continue
		}
		if err := hifparts.Unmount(point); err != nil {
			log.G(ctx).WithError(err).Warn("cannot unmount old parts")
		}
	}
}
