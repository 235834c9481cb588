// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// mounts says how to mount an active snapshot or a view.
func (s *Snapshotter) mounts(ctx context.Context, sn storage.Snapshot, info snapshots.Info, r store.Snapshot) ([]mount.Mount, error) {
	upper := s.store.Tiers.Upper(r.Tier, sn.ID)
	extraction := sn.Kind == snapshots.KindActive && isExtraction(info.Name)
	if extraction && (r.Image != nil || len(sn.ParentIDs) == 0) {
		return extractionMounts(upper), nil
	}
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
	if s.config.Reach != nil {
		if err := s.config.Reach(); err != nil {
			return nil, fmt.Errorf("mount snapshot %q: %w", info.Name, err)
		}
	}
	view, err := s.view(ctx, info.Parent, sn.ParentIDs[0])
	if err != nil {
		return nil, fmt.Errorf("mount snapshot %q: %w", info.Name, err)
	}
	tree := view
	if r.UIDMap != "" {
		if tree, err = s.store.Idmapped(view, sn.ID, sn.ParentIDs[0], r.UIDMap, r.GIDMap); err != nil {
			return nil, err
		}
	}
	var options []string
	if sn.Kind == snapshots.KindActive {
		options = append(options, "workdir="+filepath.Join(s.store.Tiers.Staging(r.Tier, sn.ID), "work"), "upperdir="+upper)
	}
	parts := s.store.Parts(ctx, sn.ParentIDs[0])
	options = append(options, s.lowerOptions(treeOf(tree), parts, homeOf(view))...)
	if sn.Kind == snapshots.KindActive && r.Tier == placement.HDD {
		options = readOnlyToCopyVolumes(options, s.store.EmptyLower())
	}
	start := trace.Start{Upper: upper, Tree: treeOf(tree), Parts: parts, Home: homeOf(view)}
	if err := s.watchStart(ctx, sn, info, r, start); err != nil {
		log.G(ctx).WithError(err).WithField("key", info.Name).Warn("the start of a container is not traced")
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}, notByPath(sn.Kind)}, nil
}

// homeOf is the directory of a view in which all data files stand by number.
func homeOf(view string) string { return filepath.Join(view, "h") }

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

// lowerOptions are the overlay options for a tree with the places of data behind
// it: NVM, the parts of large files if there are some, and the packs.
//
// They must be one "lowerdir=". To see what a container has changed, containerd
// mounts its snapshot read-only: it takes the upper directory away and puts it
// in front of what follows "lowerdir=" (mount.WithReadonlyTempMount). With the
// newer lowerdir+ and datadir+ it finds nothing there, and the commit of a
// container would be empty without a word.
//
// A tree and an upper directory never stand on one filesystem. Without xino=on
// overlayfs then numbers directories anew whenever they leave its cache, and files
// have a device of their own.
//
// An idmapped tree has commas in its path, at which containerd shall find the
// pieces of it (store.Idmapped).
func (s *Snapshotter) lowerOptions(tree, parts, home string) []string {
	lower := []string{tree, s.store.Tiers.DataRoot()}
	if parts != "" {
		lower = append(lower, parts)
	}
	lower = append(lower, home)
	features := s.store.Features()
	options := features.Options()
	if s.config.Xino {
		options = append(options, "xino=on")
	}
	return append(options, strings.Split("lowerdir="+strings.Join(lower, "::"), ",")...)
}

// readOnlyToCopyVolumes changes the options of a writable mount, of which the last
// must be "lowerdir=", so that CRI mounts it read-only when it copies what the image
// has in a volume. The unmounting of a writable overlay writes back all that is dirty
// on the filesystem of the upper directory: on HDD that may take minutes.
//
// CRI (WithVolumes) adds "ro" itself where there is but one mount, and here are two
// (notByPath). But before it mounts, it takes out what begins with "uidmap". So "ro"
// comes first, hidden from containerd behind "workdir=", which goes with it where
// containerd mounts without the upper directory; and a last option "uidmap,rw" makes
// the mount writable again for all others. For the kernel its first half is the end of
// a path, since the comma before it is escaped: empty is a directory below which
// nothing stands, under two names, of which one ends in ",uidmap".
//
// A "remount,ro" as a second mount would not do: the kernel syncs for that, too.
func readOnlyToCopyVolumes(options []string, empty string) []string {
	for i, o := range options {
		if strings.HasPrefix(o, "workdir=") {
			options[i] = o + ",ro"
			break
		}
	}
	options[len(options)-1] += "::" + empty + `\`
	return append(options, "uidmap,rw")
}

// extractionMounts are for an applier that writes by path. Without parents it is
// still an overlay: on a bind mount the applier drops whiteouts (containerd#13030).
// Parents are not named: of a layer whose image is known, what is written there is
// replaced by our own unpacking.
func extractionMounts(upper string) []mount.Mount {
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + upper}}}
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
