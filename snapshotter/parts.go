// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/placement"
)

// divided is the touched parts of large files, one image and mount for each
// chain of layers, by the id of its top (package parts).
type divided struct {
	s *Snapshotter
	// unable is why this kernel, or this NVM, mounts none; nil: it may.
	mu     sync.Mutex
	unable error
}

func newDivided(s *Snapshotter) *divided {
	d := &divided{s: s}
	if !s.features.FileBacked || s.features.UseLoop() {
		d.unable = fmt.Errorf("parts of files need EROFS from a file below an overlay of a container (Linux 6.12): %w", errdefs.ErrNotImplemented)
	}
	return d
}

func (d *divided) image(id string) string {
	return filepath.Join(d.s.tiers.Root(placement.NVM), "p", id+".erofs")
}

func (d *divided) point(id string) string { return d.s.state("p", id) }

// mounted returns the mount point of the parts of the chain that ends in a
// layer, "" if there are none. It never fails: without, files are read whole
// from where they stand.
func (d *divided) mounted(ctx context.Context, id string) string {
	image, point := d.image(id), d.point(id)
	if _, err := os.Lstat(image); err != nil {
		return ""
	}
	// Before the lock: while parts of another chain are mounted, whose files on HDD
	// have to be found, nobody else waits.
	if parts.Mounted(point) {
		return point
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unable != nil {
		return ""
	}
	if parts.Mounted(point) {
		return point
	}
	if err := d.mount(ctx, image, point); err != nil {
		return ""
	}
	return point
}

// mount mounts the parts anew. What can never be used goes: the manager makes
// it again. Called with mu held.
func (d *divided) mount(ctx context.Context, image, point string) error {
	err := parts.Mount(image, point, d.s.tiers.DataRoot(placement.HDD))
	switch {
	case err == nil:
		return nil
	case errdefs.IsNotImplemented(err):
		d.unable = err
		log.G(ctx).WithError(err).Warn("hot files stay whole")
	default:
		log.G(ctx).WithError(err).Warn("parts of large files cannot be used; they are made again")
	}
	return errors.Join(err, parts.Unmount(point), os.Remove(image))
}

// changed mounts what stands there now, for who comes next.
func (d *divided) changed(ctx context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := os.Lstat(d.image(id)); err != nil {
		return parts.Unmount(d.point(id))
	}
	return d.mount(ctx, d.image(id), d.point(id))
}

// drop takes the parts of a chain away, mount and image.
func (d *divided) drop(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := parts.Unmount(d.point(id))
	if e := os.Remove(d.image(id)); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// path is where the parts of a chain are to be made, "" where they cannot be mounted.
func (d *divided) path(id string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unable != nil {
		return ""
	}
	return d.image(id)
}

// forget takes away the parts of every chain that has files of a layer: its
// data on HDD are about to be replaced.
func (d *divided) forget(layer string) error {
	images, err := filepath.Glob(d.image("*"))
	for _, image := range images {
		set, e := parts.Read(image)
		of := func(f parts.File) bool { return strings.HasPrefix(f.Redirect, "/"+layer+"/") }
		if e != nil || slices.ContainsFunc(set.Files, of) {
			err = errors.Join(err, d.drop(strings.TrimSuffix(filepath.Base(image), ".erofs")))
		}
	}
	return err
}

// recover unmounts what is not what stands on NVM: the daemon died between
// writing parts and mounting them.
func (d *divided) recover(ctx context.Context) {
	points, _ := filepath.Glob(d.point("*")) // fails for a bad pattern only
	for _, point := range points {
		if parts.Current(d.image(filepath.Base(point)), point) {
			continue
		}
		if err := parts.Unmount(point); err != nil {
			log.G(ctx).WithError(err).Warn("cannot unmount old parts")
		}
	}
}

// bytes tells how much of each file of a chain stands on NVM in parts, by redirect.
func (d *divided) bytes(id string) map[string]int64 {
	set, err := parts.Read(d.image(id))
	if err != nil {
		return nil
	}
	out := make(map[string]int64, len(set.Files))
	for _, f := range set.Files {
		out[f.Redirect] = f.Bytes()
	}
	return out
}
