// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
)

// mounts says how to mount an active snapshot or a view.
func (s *Snapshotter) mounts(ctx context.Context, sn storage.Snapshot, info snapshots.Info, r record) ([]mount.Mount, error) {
	if sn.Kind == snapshots.KindActive && isExtraction(info.Name) {
		return s.extractionMounts(sn), nil
	}
	upper := filepath.Join(s.tiers.Staging(r.Tier, sn.ID), "fs")
	if sn.Kind == snapshots.KindActive {
		// Nobody syncs what a container writes, nor the directory it writes to.
		if _, err := os.Lstat(upper); errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("mount snapshot %q: what its container wrote, on %s, is gone: the device was lost, or the machine went down right after the container was made; remove the container and make it anew: %w",
				info.Name, r.Tier, errdefs.ErrDataLoss)
		}
	}
	if len(sn.ParentIDs) == 0 {
		mode := "rw"
		if sn.Kind == snapshots.KindView {
			mode = "ro"
		}
		return []mount.Mount{{Type: "bind", Source: upper, Options: []string{mode, "rbind"}}}, nil
	}
	tree, err := s.tree(ctx, info.Parent, sn.ParentIDs[0])
	if err != nil {
		return nil, fmt.Errorf("mount snapshot %q: %w", info.Name, err)
	}
	if r.UIDMap != "" {
		if tree, err = s.idmapped(tree, sn.ID, sn.ParentIDs[0], r.UIDMap, r.GIDMap); err != nil {
			return nil, err
		}
	}
	var options []string
	if sn.Kind == snapshots.KindActive {
		options = append(options, "workdir="+filepath.Join(s.tiers.Staging(r.Tier, sn.ID), "work"), "upperdir="+upper)
	}
	parts := s.divided.mounted(ctx, sn.ParentIDs[0])
	options = append(options, s.lowerOptions(tree, parts)...)
	s.watchStart(sn, info, r, trace.Start{Upper: upper, Tree: tree, Parts: parts})
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}, notByPath(sn.Kind)}, nil
}

// notByPath is a second mount that does nothing (mount.Mount makes no call for
// it). It keeps containerd from taking the overlay for its directories: where
// an overlay is the last mount, containerd 2.4 looks up users in the
// directories themselves (internal/fsview), and where it is the only one, the
// applier writes to the upper directory by path and takes owners of parent
// directories from what stands between the colons of "lowerdir=", an empty
// name being the host's root. Neither knows of trees and data-only layers. For
// a mount of a type they do not know both mount, as they should.
//
// Run by mount(8), as the command that ctr snapshots mounts prints, it changes
// nothing either: what is read-only stays so, where mount(8) would refuse to
// make it writable.
func notByPath(kind snapshots.Kind) mount.Mount {
	options := []string{"remount"}
	if kind == snapshots.KindView {
		options = append(options, "ro")
	}
	return mount.Mount{Type: "none", Source: "none", Options: options}
}

// lowerOptions are the overlay options for a tree with the two data roots
// behind it, and between them the parts of large files if there are some.
//
// They must be one "lowerdir=". To see what a container has changed, containerd
// mounts its snapshot read-only: it takes the upper directory away and puts it
// in front of what follows "lowerdir=" (mount.WithReadonlyTempMount). With the
// newer lowerdir+ and datadir+ it finds nothing there, and the commit of a
// container would be empty without a word.
//
// An idmapped tree has commas in its path, at which containerd shall find the
// pieces of it; see idmapped.
func (s *Snapshotter) lowerOptions(tree, parts string) []string {
	lower := []string{tree, s.tiers.DataRoot(placement.NVM)}
	if parts != "" {
		lower = append(lower, parts)
	}
	lower = append(lower, s.tiers.DataRoot(placement.HDD))
	return append(strings.Split("lowerdir="+strings.Join(lower, "::"), ","), s.features.Options()...)
}

// extractionMounts are written to by path and never mounted: the upper
// directory through the link, and the parents' own directories, from which
// containerd's applier takes owner and mode of parent directories that a layer
// does not list. Without parents it is still an overlay: on a bind mount the
// applier drops whiteouts (containerd#13030).
func (s *Snapshotter) extractionMounts(sn storage.Snapshot) []mount.Mount {
	options := []string{"upperdir=" + s.tiers.Linked(sn.ID)}
	if parents := s.ownDirs(sn.ParentIDs); len(parents) > 0 {
		options = append(options, "lowerdir="+strings.Join(parents, ":"))
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

// ownDirs are the directories of layers, on whatever tiers they have some.
func (s *Snapshotter) ownDirs(ids []string) (dirs []string) {
	for _, id := range ids {
		for _, t := range tier.Tiers {
			if st, err := os.Lstat(s.tiers.Data(t, id)); err == nil && st.IsDir() {
				dirs = append(dirs, s.tiers.Data(t, id))
			}
		}
	}
	return dirs
}

// erofsMagic is EROFS_SUPER_MAGIC_V1.
const erofsMagic = 0xe0f5e1e2

// isErofs reports that a tree is mounted on dir. The roots themselves cannot
// be EROFS, which is read-only.
func isErofs(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && uint32(st.Type) == erofsMagic
}

// unmount takes a mount point away, also while something still looks into it.
func unmount(dir string) error {
	if isErofs(dir) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %q: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}
