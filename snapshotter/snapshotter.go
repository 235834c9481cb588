// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package snapshotter implements containerd's snapshots.Snapshotter and
// diff.Applier on a store of two tiers. It is the only package that knows
// containerd's contract; layers and their life are package store's.
//
// When the first layer of an image is asked for, the layers of the image begin
// to be unpacked while they download. Apply waits for that and binds the layer to
// the snapshot; Commit is one transaction, since containerd waits for it inside a
// write transaction of its own.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Labels of a snapshot that nhybrid understands beside containerd's own.
const (
	// LabelUpperTier chooses the tier of a writable directory: "nvm" or "hdd".
	LabelUpperTier = "containerd.io/snapshot/nhybrid.upper-tier"
	// labelMaxSize is containerd's hint of a quota in bytes (containerd 2.4).
	labelMaxSize = "containerd.io/snapshot/max-size"
	labelRef     = "containerd.io/snapshot.ref"
)

// Config is what a Snapshotter needs to know. Root, NVMRoot and Policy have no defaults.
type Config struct {
	// Store is the configuration of the store; its Blobs and Traffic are the
	// snapshotter's.
	Store     store.Config
	Policy    placement.Policy
	UpperTier placement.Tier // of writable directories
	// Xino mounts containers with xino=on: inode numbers are of 64 bits, and stay
	// when caches are dropped. Without it no caches are dropped.
	Xino       bool
	Poll       time.Duration // how often running pulls are looked at beside events; default 50 ms
	SyncRemove bool          // Remove waits until the files are gone
	// Downloads tells what containerd downloads; nil: nothing ever.
	Downloads Downloads
	// Reach is nil or says why containerd does not see what is mounted here; it is
	// asked whenever a container is to be mounted. nil: it always does.
	Reach func() error
	// Processors tells for which media types, beside those that unpack reads, a stream
	// processor is registered with containerd's package diff; nil: for none.
	Processors func(mediaType string) bool
	// Hot says how hot files are found and moved; nil: not at all.
	Hot *hif.Config
}

// Snapshotter is a snapshots.Snapshotter and snapshots.Cleaner. All methods
// may be called from several goroutines at once.
type Snapshotter struct {
	config  Config
	store   *store.Store
	pulls   *pulls
	hot     *hif.Manager // nil: none
	pins    *tier.Pins   // nil: likewise
	metrics counters
	closing sync.Once
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the store and takes up what an earlier run left to do. It returns
// before that work is done.
//
// Errors: those of [store.Open].
func New(ctx context.Context, c Config) (_ *Snapshotter, err error) {
	if c.Policy == nil {
		return nil, fmt.Errorf("no placement policy given: %w", errdefs.ErrInvalidArgument)
	}
	if c.Poll == 0 {
		c.Poll = 50 * time.Millisecond
	}
	s := &Snapshotter{config: c, metrics: newCounters()}
	s.pulls = newPulls(s)
	c.Store.Traffic = traffic{s}
	if c.Downloads != nil {
		c.Store.Blobs = c.Downloads
	}
	if s.store, err = store.Open(ctx, c.Store, s.layerChanged); err != nil {
		return nil, err
	}
	if err := s.newHot(ctx); err != nil {
		return nil, errors.Join(err, s.store.Close())
	}
	s.pulls.start()
	if s.hot != nil {
		s.hot.Start()
	}
	return s, nil
}

// traffic tells the store what goes on.
type traffic struct{ s *Snapshotter }

func (t traffic) Pulling() bool { return t.s.pulls.busy() }

func (t traffic) Starting() bool { return t.s.starting() }

// layerChanged is told of each change of a layer's record. It must not wait for the store.
func (s *Snapshotter) layerChanged(_ store.LayerID, l store.Layer) {
	if l.State == store.Durable || l.State == store.Home {
		s.kickHot()
	}
}

// Close ends the background work and closes the database. Nothing is unmounted
// and nothing deleted: containers go on. It may be called twice.
func (s *Snapshotter) Close() (err error) {
	s.closing.Do(func() {
		if s.hot != nil {
			err = s.hot.Close()
		}
		s.pulls.close()
		err = errors.Join(err, s.store.Close())
		if s.pins != nil {
			err = errors.Join(err, s.pins.Close())
		}
	})
	return err
}

// Stat returns the info of an active or committed snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.store.ViewTx(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.store.UpdateTx(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Usage tells the disk usage of a snapshot without its parents. For an active
// one the directory is walked; for a committed one it waits for the layer.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	id, info, sn, err := s.get(ctx, key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	switch {
	case info.Kind == snapshots.KindView:
		return snapshots.Usage{}, nil
	case info.Kind == snapshots.KindActive:
		_, usage, err := s.store.Written(ctx, id)
		return usage, err
	case sn.Layer == 0:
		return snapshots.Usage{}, nil
	}
	var l store.Layer
	err = bounded(ctx, func(ctx context.Context) (err error) {
		l, err = s.store.Await(ctx, sn.Layer)
		return err
	})
	return l.Usage, err
}

// get reads a snapshot and its record.
func (s *Snapshotter) get(ctx context.Context, key string) (id string, info snapshots.Info, sn store.Snapshot, err error) {
	err = s.store.ViewTx(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if id, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		sn, err = store.GetSnapshot(tx, id)
		return err
	})
	return id, info, sn, err
}

// Walk calls fn for each snapshot that matches one of the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.store.Walk(ctx, fn, filters...)
}

// Prepare creates a writable snapshot on a committed parent, or on nothing.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View creates a read-only snapshot of a committed parent, or of nothing.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// Mounts returns the mounts of an active snapshot or view. It waits for the
// view of the parent where that is not there yet.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var sn storage.Snapshot
	var info snapshots.Info
	var r store.Snapshot
	err := s.store.ViewTx(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if sn, err = storage.GetSnapshot(ctx, key); err != nil {
			return fmt.Errorf("get mounts: %w", err)
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		r, err = store.GetSnapshot(tx, sn.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(ctx, sn, info, r)
}

// Commit turns an active snapshot into a committed one, by one transaction.
// containerd holds its own write transaction meanwhile, so that nothing here may
// call it.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	start := time.Now()
	id, _, sn, err := s.get(ctx, key)
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	layer := sn.Layer
	if layer == 0 {
		// Another applier has written the directory. Our own unpacking of the same
		// blob takes its place.
		if spec, ok := s.pulls.spec(id, sn); ok {
			if layer, _, err = s.store.Begin(ctx, spec); err != nil {
				return fmt.Errorf("commit snapshot %q: %w", key, err)
			}
			defer s.store.Release(layer)
		}
	}
	var changed []store.LayerID
	err = s.store.UpdateTx(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		// Usage is not known before the layer is stored; Usage takes it from the record.
		if id, err = storage.CommitActive(ctx, key, name, snapshots.Usage{}, opts...); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		r, err := store.GetSnapshot(tx, id)
		if err != nil {
			return err
		}
		r.UIDMap, r.GIDMap = "", ""
		if err := store.PutSnapshot(tx, id, r); err != nil {
			return err
		}
		if layer != 0 {
			changed, err = s.store.Bind(tx, id, layer)
			return err
		}
		parents, err := store.ChainBelow(ctx, tx, name)
		if err != nil {
			return err
		}
		changed, err = s.store.CommitPath(tx, id, parents)
		return err
	})
	if err != nil {
		return err
	}
	s.store.Bound(changed)
	s.pulls.committed(id)
	if layer != 0 {
		s.store.UnstageLater(id)
	}
	if sn.Image == nil || sn.Image.Index == sn.Image.Layers-1 {
		s.store.ViewLater(id, name)
		s.kickHot()
	}
	log.G(ctx).WithFields(log.Fields{"id": id, "name": name, "layer": layer, "took": time.Since(start)}).Debug("committed")
	return nil
}

// Remove forgets a snapshot; its files go in the background.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	var changed []store.LayerID
	err := s.store.UpdateTx(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if id, _, err = storage.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove snapshot %q: %w", key, err)
		}
		changed, err = s.store.RemoveSnapshot(tx, id)
		return err
	})
	if err != nil {
		return err
	}
	s.pulls.removed(id)
	s.store.Bound(changed)
	if s.config.SyncRemove {
		return errors.Join(s.store.RemoveNow(ctx, id), s.store.WaitRemoved(ctx))
	}
	s.store.RemoveLater(id)
	return nil
}

// Cleanup waits until the files of all removed snapshots are gone.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	ids, err := s.store.Removed(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		err = errors.Join(err, s.store.RemoveNow(ctx, id))
	}
	return errors.Join(err, s.store.WaitRemoved(ctx))
}

// patience is how long a call waits for background work. containerd holds a
// lock of the snapshotter meanwhile, for which its garbage collection waits,
// and for that everybody else (containerd#13798).
const patience = 20 * time.Second

// bounded runs fn, which waits for background work, for at most patience. The
// work itself goes on.
func bounded(ctx context.Context, fn func(context.Context) error) error {
	inner, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := fn(inner)
	if err != nil && inner.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("not ready after %s, the work goes on; try again: %w", patience, errdefs.ErrUnavailable)
	}
	return err
}
