// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

// The tree of a snapshot with a user namespace stands twice below the state
// directory: idmapped at i/<id>, and with the owners of the image at u/<id>, a
// symlink to the tree of its parent.
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
)

// unmappedLinks are what idmappedLink becomes where containerd takes options out.
var unmappedLinks = []string{
	idmappedDir + ",workdir=,", // mount.RemoveIDMapOption: what begins with "uidmap" or "gidmap"
	idmappedDir + ",uidmap,",   // mount.WithReadonlyTempMount: what begins with "workdir=", "uidmap=" or "gidmap="
	idmappedDir + ",",
}

// linkTrees makes the links through which the trees of snapshots with user
// namespaces are found.
func (s *Snapshotter) linkTrees() error {
	err := link(idmappedDir, s.state(idmappedLink))
	for _, name := range unmappedLinks {
		err = errors.Join(err, link(unmappedDir, s.state(name)))
	}
	return err
}

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

// idmapped makes a mount of the tree of a parent in which owners are shifted by
// the maps, and returns its path as it is written in mount options, with
// escaped commas. Only the tree needs it: the owner of every file comes from
// there.
func (s *Snapshotter) idmapped(tree, id, parent, uidmap, gidmap string) (string, error) {
	path := s.state(strings.ReplaceAll(idmappedLink, ",", `\,`), id)
	if err := link(filepath.Join("..", "t", parent), s.state(unmappedDir, id)); err != nil {
		return "", fmt.Errorf("link the tree for snapshot id %s: %w", id, err)
	}
	dir := s.state(idmappedDir, id)
	if isErofs(dir) {
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
	if err := mount.IDMapMount(tree, dir, int(userns.Fd())); err != nil {
		return "", fmt.Errorf("idmap the tree for snapshot id %s: %w", id, err)
	}
	return path, nil
}

// dropIDMapped takes away what idmapped made for a snapshot.
func (s *Snapshotter) dropIDMapped(id string) error {
	err := unmount(s.state(idmappedDir, id))
	if e := os.Remove(s.state(unmappedDir, id)); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// mappedRoot is the host id of root in a map "container:host:size[,…]".
func mappedRoot(idmap string) (int, error) {
	for m := range strings.SplitSeq(idmap, ",") {
		p := strings.Split(m, ":")
		if len(p) != 3 {
			return 0, fmt.Errorf("id map %q: want container:host:size: %w", idmap, errdefs.ErrInvalidArgument)
		}
		var n [3]uint64
		for i := range p {
			v, err := strconv.ParseUint(p[i], 10, 32)
			if err != nil {
				return 0, fmt.Errorf("id map %q: %q is not a number: %w", idmap, p[i], errdefs.ErrInvalidArgument)
			}
			n[i] = v
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("id map %q does not map root: %w", idmap, errdefs.ErrInvalidArgument)
}
