// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// isExtraction tells whether containerd is going to unpack a layer into the
// snapshot. Such a snapshot is written by path, never mounted.
//
// The key tells: containerd's unpacker makes it by snapshots.UnpackKeyFormat,
// and its metadata layer turns it into "<namespace>/<n>/<key>". The prefix alone
// does not, since some clients take the name that a user gives a container for
// the key of its snapshot; such a name has no blank. Labels do not tell either:
// ctr pull --local sets none, and CRI passes on what it finds in the annotations
// of a pod.
func isExtraction(key string) bool { return chainIDInKey(key) != "" }

// chainIDInKey is the chain id in the key of an extraction,
// "extract-<time>-<random> <chain id>"; "" if the key is not of this form.
func chainIDInKey(key string) string {
	unique, chainID, _ := strings.Cut(clientKey(key), " ")
	if unique, ok := strings.CutPrefix(unique, snapshots.UnpackKeyPrefix+"-"); !ok || unique == "" {
		return ""
	}
	if _, err := digest.Parse(chainID); err != nil {
		return ""
	}
	return chainID
}

func clientKey(key string) string {
	if p := strings.SplitN(key, "/", 3); len(p) == 3 {
		if _, err := strconv.ParseUint(p[1], 10, 64); err == nil {
			return p[2]
		}
	}
	return key
}

// chainIDOf is the chain id that an extraction will be committed as.
func chainIDOf(key string, labels map[string]string) string {
	if ref := labels[labelRef]; ref != "" {
		return ref
	}
	return chainIDInKey(key)
}

func namespaceOf(ctx context.Context, key string) string {
	if ns, ok := namespaces.Namespace(ctx); ok {
		return ns
	}
	// garbage collection brings no namespace along
	ns, _, _ := strings.Cut(key, "/")
	return ns
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, err
		}
	}
	r := record{Tier: s.config.UpperTier, Namespace: namespaceOf(ctx, key)}
	extraction := kind == snapshots.KindActive && isExtraction(key)
	if !extraction {
		if err := s.readLabels(key, base.Labels, &r); err != nil {
			return nil, err
		}
		s.admitUpper(ctx, key, &r)
	}
	// What stands below first: if it cannot be had, nothing has been created.
	below, err := s.awaitParent(ctx, parent, extraction)
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot %q: %w", key, err)
	}
	var e *extract
	if extraction {
		r.ChainID = chainIDOf(key, base.Labels)
		e = s.placer.plan(ctx, r.Namespace, r.ChainID, parent, base.Labels)
		defer func() {
			if err != nil {
				s.placer.dropped(e)
			}
		}()
		r.Tier, r.Image, r.Decision = e.tier(), e.image(), e.text()
	}
	var staged string
	if kind == snapshots.KindActive || parent == "" { // nothing is written to a view
		if staged, err = s.prestage(&r, below); err != nil {
			return nil, err
		}
	}

	var sn storage.Snapshot
	err = s.db.update(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if sn, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("create snapshot %q: %w", key, err)
		}
		if staged != "" {
			if err := s.tiers.Stage(sn.ID, r.Tier, staged); err != nil {
				return err
			}
		}
		err = s.dress(sn, r, extraction)
		if err == nil {
			err = putRecord(tx, sn.ID, r)
		}
		if err != nil && staged != "" {
			// Here, while the transaction stops everybody else: after the rollback
			// the next snapshot gets the same id.
			err = errors.Join(err, s.tiers.Remove(sn.ID))
		}
		return err
	})
	if err != nil {
		if staged != "" {
			err = errors.Join(err, s.tiers.Unprestage(r.Tier, staged))
		}
		return nil, err
	}
	s.mirror.changed()
	if extraction {
		s.placer.began(ctx, e, sn.ID, r.Tier)
	}
	mounts, err := s.mounts(ctx, sn, snapshots.Info{Kind: kind, Labels: base.Labels, Parent: parent, Name: key}, r)
	if err != nil {
		// A snapshot whose mounts cannot be had is of no use to the caller,
		// who never learns of it: it must not stand in the way of the next try.
		if err2 := s.Remove(context.WithoutCancel(ctx), key); err2 != nil {
			log.G(ctx).WithError(err2).WithField("key", key).Warn("could not take back a snapshot")
		}
		return nil, err
	}
	return mounts, nil
}

// readLabels takes from the labels of a container's snapshot what concerns us.
// Labels come from users, and from images: nonsense is an error that names it.
func (s *Snapshotter) readLabels(key string, labels map[string]string, r *record) error {
	if v, ok := labels[LabelUpperTier]; ok {
		if err := r.Tier.UnmarshalText([]byte(v)); err != nil {
			return fmt.Errorf("label %s=%q of snapshot %q: want nvm or hdd: %w", LabelUpperTier, v, key, errdefs.ErrInvalidArgument)
		}
	}
	r.UIDMap, r.GIDMap = labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if (r.UIDMap == "") != (r.GIDMap == "") {
		return fmt.Errorf("snapshot %q has only one of the labels %s and %s: %w", key,
			snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping, errdefs.ErrInvalidArgument)
	}
	if v, ok := labels[labelMaxSize]; ok {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n <= 0 {
			return fmt.Errorf("label %s=%q of snapshot %q: want a positive number of bytes: %w", labelMaxSize, v, key, errdefs.ErrInvalidArgument)
		}
		r.MaxSize = n
	}
	return nil
}

// admitUpper sends a writable directory to HDD when NVM has no room but its reserve.
func (s *Snapshotter) admitUpper(ctx context.Context, key string, r *record) {
	if r.Tier != placement.NVM {
		return
	}
	free, total, err := s.tiers.Space(placement.NVM)
	if err == nil && free > s.config.Reserve(total) {
		return
	}
	r.Tier = placement.HDD
	log.G(ctx).WithField("key", key).Infof("writable directory on HDD: NVM has %s free, the reserve is %s",
		placement.FormatBytes(free), placement.FormatBytes(s.config.Reserve(total)))
}

// prestage makes the directories of a new snapshot, on HDD if NVM has no room
// even for them.
func (s *Snapshotter) prestage(r *record, below string) (string, error) {
	uid, gid, err := rootOwner(*r, below)
	if err != nil {
		return "", err
	}
	name, err := s.tiers.Prestage(r.Tier, uid, gid)
	if errors.Is(err, unix.ENOSPC) && r.Tier == placement.NVM {
		r.Tier = placement.HDD
		name, err = s.tiers.Prestage(r.Tier, uid, gid)
	}
	return name, err
}

// dress gives a new snapshot what depends on its id.
func (s *Snapshotter) dress(sn storage.Snapshot, r record, extraction bool) error {
	switch {
	case extraction:
		return s.tiers.Link(sn.ID, r.Tier)
	case r.MaxSize > 0 && sn.Kind == snapshots.KindActive:
		return s.quota.limit(sn.ID, r.Tier, r.MaxSize)
	}
	return nil
}

// awaitParent makes sure that a committed parent can be used, and returns the
// directory that shows its root: for a container the mounted tree, for an
// extraction the layer's own directory, from which containerd takes owners.
// Whether the parent exists and is committed is for the transaction to tell.
func (s *Snapshotter) awaitParent(ctx context.Context, parent string, extraction bool) (string, error) {
	if parent == "" {
		return "", nil
	}
	var id string
	var info snapshots.Info
	err := s.db.view(ctx, func(ctx context.Context, _ *bolt.Tx) (err error) {
		id, info, _, err = storage.GetInfo(ctx, parent)
		return err
	})
	if errdefs.IsNotFound(err) || (err == nil && info.Kind != snapshots.KindCommitted) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if !extraction {
		return s.tree(ctx, parent, id)
	}
	// The owners of a torn layer would stay wrong in the one above for ever.
	if err := s.bounded(ctx, func(ctx context.Context) error { return s.intact(ctx, parent) }); err != nil {
		return "", err
	}
	if dirs := s.ownDirs([]string{id}); len(dirs) > 0 {
		return dirs[0], nil
	}
	return "", nil
}

// rootOwner is the owner of the root directory of a new snapshot: the mapped
// root in a user namespace, else that of what stands below, as overlayfs shows
// the root with the attributes of the upper directory.
func rootOwner(r record, below string) (uid, gid int, err error) {
	if r.UIDMap != "" {
		if uid, err = mappedRoot(r.UIDMap); err != nil {
			return 0, 0, err
		}
		gid, err = mappedRoot(r.GIDMap)
		return uid, gid, err
	}
	if below == "" {
		return 0, 0, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(below, &st); err != nil {
		return 0, 0, fmt.Errorf("stat the root of the parent: %w", err)
	}
	return int(st.Uid), int(st.Gid), nil
}
