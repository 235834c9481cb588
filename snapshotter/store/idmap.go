// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// The view of a snapshot with a user namespace stands twice below the state
// directory: idmapped at i/<id>, and with the owners of the image at u/<id>, a
// symlink to the view of its parent.
//
// Containers need the first. containerd itself needs the second, to copy what
// an image has in a volume (CRI's WithVolumes) and to compare a snapshot with
// its parent (mount.WithReadonlyTempMount). It says which one it means by what
// it takes out of the mount options: with overlayfs, the options "uidmap=" and
// "gidmap=" make containerd idmap the lower directories, which cannot be done
// with data-only layers. So the path of the tree itself holds an option that
// the first of these takes out, "uidmap", and one that the second takes out,
// "workdir=", each between escaped commas: to containerd, which splits nothing
// but its list and joins it with commas, these are options, to the kernel they
// are a part of the path. What is left without one of them, or without both, is
// the path of the other tree.
const (
	idmappedDir = "i"
	unmappedDir = "u"
	// idmappedLink is the directory of the idmapped trees as both see it.
	idmappedLink = idmappedDir + ",workdir=,uidmap,"
	// emptyDir is a directory without content, and emptyLink leads to it.
	emptyDir  = "e"
	emptyLink = emptyDir + ",uidmap"
)

// unmappedLinks are what idmappedLink becomes where containerd takes options out.
var unmappedLinks = []string{
	idmappedDir + ",workdir=,", // mount.RemoveIDMapOption: what begins with "uidmap" or "gidmap"
	idmappedDir + ",uidmap,",   // mount.WithReadonlyTempMount: what begins with "workdir=", "uidmap=" or "gidmap="
	idmappedDir + ",",
}

// linkTrees makes the links through which the kernel and containerd find the same
// directories by different mount options.
func (s *Store) linkTrees() error {
	err := link(idmappedDir, s.StatePath(idmappedLink))
	for _, name := range unmappedLinks {
		err = errors.Join(err, link(unmappedDir, s.StatePath(name)))
	}
	return errors.Join(err, link(emptyDir, s.StatePath(emptyLink)))
}

// EmptyLower is an empty directory to stand last in a "lowerdir=". There is the same
// under the name that ends in ",uidmap".
func (s *Store) EmptyLower() string { return s.StatePath(emptyDir) }

// link makes a symlink, or puts one that is there already right.
func link(target, path string) error {
	err := os.Symlink(target, path)
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	if is, err := os.Readlink(path); err == nil && is == target {
		return nil
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.Symlink(target, path)
}

// Idmapped makes a mount of the view of a parent in which owners are shifted by
// the maps, and returns its path as it is written in mount options, with escaped
// commas. Only the tree needs it: the owner of every file comes from there.
func (s *Store) Idmapped(view, id, parent, uidmap, gidmap string) (string, error) {
	path := s.StatePath(strings.ReplaceAll(idmappedLink, ",", `\,`), id)
	if err := link(filepath.Join("..", "v", parent), s.StatePath(unmappedDir, id)); err != nil {
		return "", fmt.Errorf("link the view for snapshot id %s: %w", id, err)
	}
	dir := s.StatePath(idmappedDir, id)
	if pack.Mounted(dir) {
		return path, nil
	}
	if !s.features.IDMap {
		return "", fmt.Errorf("this kernel cannot idmap an EROFS mount for overlayfs; run the pod without a user namespace: %w", errdefs.ErrNotImplemented)
	}
	userns, err := mount.GetUsernsFD(uidmap, gidmap)
	if err != nil {
		return "", fmt.Errorf("make a user namespace for uid map %q, gid map %q: %w", uidmap, gidmap, err)
	}
	defer userns.Close()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("create mount point: %w", err)
	}
	if err := mount.IDMapMount(view, dir, int(userns.Fd())); err != nil {
		return "", fmt.Errorf("idmap the view for snapshot id %s: %w", id, err)
	}
	return path, nil
}

// dropIDMapped takes away what idmapped made for a snapshot.
func (s *Store) dropIDMapped(id string) error {
	err := unmount(s.StatePath(idmappedDir, id))
	if e := os.Remove(s.StatePath(unmappedDir, id)); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}
