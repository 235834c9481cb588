// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
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
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// isExtraction reports whether containerd is going to unpack a layer into the
// snapshot.
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
	unique, chainID, _ := strings.Cut(store.ClientKey(key), " ")
	if unique, ok := strings.CutPrefix(unique, snapshots.UnpackKeyPrefix+"-"); !ok || unique == "" {
		return ""
	}
	if _, err := digest.Parse(chainID); err != nil {
		return ""
	}
	return chainID
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
	r := store.Snapshot{Key: key, Tier: s.config.UpperTier, Namespace: namespaceOf(ctx, key)}
	extraction := kind == snapshots.KindActive && isExtraction(key)
	var e *extract
	if extraction {
		r.ChainID = chainIDOf(key, base.Labels)
		e = s.pulls.prepare(ctx, r.Namespace, r.ChainID, base.Labels)
		defer func() {
			if err != nil {
				s.pulls.dropped(e)
			}
		}()
		r.Image = e.image()
	} else if err := s.readLabels(key, base.Labels, &r); err != nil {
		return nil, err
	}
	s.admitUpper(ctx, key, &r, s.pulls.estimate(e))
	// What stands below first: if it cannot be had, nothing has been created.
	below, err := s.awaitParent(ctx, parent, r.Image != nil)
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot %q: %w", key, err)
	}
	var staged string
	if kind == snapshots.KindActive || parent == "" { // nothing is written to a view
		if staged, err = s.prestage(&r, below); err != nil {
			return nil, err
		}
	}

	var sn storage.Snapshot
	err = s.store.UpdateTx(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if sn, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("create snapshot %q: %w", key, err)
		}
		if staged != "" {
			if err := s.store.Tiers.Stage(sn.ID, r.Tier, staged); err != nil {
				return err
			}
		}
		if r.MaxSize > 0 && sn.Kind == snapshots.KindActive {
			err = s.store.Quota.Limit(sn.ID, r.Tier, r.MaxSize)
		}
		if err == nil {
			err = store.PutSnapshot(tx, sn.ID, r)
		}
		if err != nil && staged != "" {
			// Here, while the transaction stops everybody else: after the rollback
			// the next snapshot gets the same id.
			err = errors.Join(err, s.store.Tiers.Unstage(sn.ID))
		}
		return err
	})
	if err != nil {
		if staged != "" {
			err = errors.Join(err, s.store.Tiers.Unprestage(r.Tier, staged))
		}
		return nil, err
	}
	if extraction {
		s.pulls.prepared(e, sn.ID)
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
func (s *Snapshotter) readLabels(key string, labels map[string]string, r *store.Snapshot) error {
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

// admitUpper sends a writable directory to HDD when NVM has no room but its
// reserve for the bytes that are expected in it, or had none for the same bytes
// before.
func (s *Snapshotter) admitUpper(ctx context.Context, key string, r *store.Snapshot, expected int64) {
	if r.Tier != placement.NVM {
		return
	}
	room, err := s.store.Room(placement.NVM)
	bytes, inodes := room.Left()
	if err == nil && bytes > expected && inodes > store.LeastInodes {
		return
	}
	r.Tier = placement.HDD
	log.G(ctx).WithField("key", key).Infof("writable directory on HDD: NVM has room for %s and %d files", placement.FormatBytes(bytes), inodes)
}

// prestage makes the directories of a new snapshot, on HDD if NVM has no room
// even for them.
func (s *Snapshotter) prestage(r *store.Snapshot, below string) (string, error) {
	uid, gid, err := rootOwner(*r, below)
	if err != nil {
		return "", err
	}
	name, err := s.store.Tiers.Prestage(r.Tier, uid, gid)
	if errors.Is(err, unix.ENOSPC) && r.Tier == placement.NVM {
		r.Tier = placement.HDD
		name, err = s.store.Tiers.Prestage(r.Tier, uid, gid)
	}
	return name, err
}

// awaitParent makes sure that a committed parent can be used, and returns the
// directory that shows its root. For a layer that is unpacked by us, nothing of
// the parent is needed. Whether the parent exists and is committed is for the
// transaction to tell.
func (s *Snapshotter) awaitParent(ctx context.Context, parent string, unpacked bool) (string, error) {
	if parent == "" || unpacked {
		return "", nil
	}
	id, info, _, err := s.get(ctx, parent)
	if errdefs.IsNotFound(err) || (err == nil && info.Kind != snapshots.KindCommitted) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return s.tree(ctx, parent, id)
}

// tree returns the directory of the merged tree of the chain that ends in a snapshot.
func (s *Snapshotter) tree(ctx context.Context, name, id string) (string, error) {
	view, err := s.view(ctx, name, id)
	return treeOf(view), err
}

func (s *Snapshotter) view(ctx context.Context, name, id string) (view string, err error) {
	err = bounded(ctx, func(ctx context.Context) error {
		view, err = s.store.View(ctx, id, name)
		return err
	})
	return view, err
}

func treeOf(view string) string { return filepath.Join(view, "t") }

// rootOwner is the owner of the root directory of a new snapshot: the mapped
// root in a user namespace, else that of what stands below, as overlayfs shows
// the root with the attributes of the upper directory.
func rootOwner(r store.Snapshot, below string) (uid, gid int, err error) {
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
