// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package snapshotter implements containerd's snapshots.Snapshotter on two
// tiers. It is the only package that knows containerd's contract.
//
// A snapshot's writable directory is staged on one of the tiers. On commit it
// becomes data of a layer: one bolt transaction and one rename, since
// containerd waits for it inside a write transaction of its own. The rest is
// background work that can be derived again from the database: the layer's
// metadata are captured, brought to the disk, and, for the top of a chain,
// merged into the tree that containers mount.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/host"
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
	Root    string // HDD tier, absolute
	NVMRoot string // NVM tier, absolute
	// State holds mount points and links, best on a tmpfs; default: run below Root.
	State  string
	Policy placement.Policy
	// Reserve tells how many bytes of an NVM filesystem of the given size
	// stay free of layers. nil keeps 5 %.
	Reserve   func(total int64) int64
	UpperTier placement.Tier // of writable directories
	Workers   int            // of background work; default 2
	HDDRate   float64        // bytes/s at which the HDD drains; 0: as measured
	Poll      time.Duration  // how often running pulls are looked at beside events; default 50 ms
	WriteBack bool           // copy layers on NVM to HDD in the background
	// WriteBackRate bounds that copying, in bytes/s; 0 does not.
	WriteBackRate int64
	SyncRemove    bool // Remove waits until the files are gone
	// Downloads tells what containerd downloads; nil: nothing ever.
	Downloads Downloads
	// Hot says how hot files are found and moved; nil: not at all.
	Hot *hif.Config
	// BootID tells boots of the machine apart; default: the kernel's.
	BootID string
}

// Snapshotter is a snapshots.Snapshotter and snapshots.Cleaner. All methods
// may be called from several goroutines at once.
type Snapshotter struct {
	config   Config
	features host.Features
	db       *database
	tiers    *tier.Store
	jobs     *jobs
	syncer   *syncer
	placer   *placer
	homing   *homing
	quota    *quotas
	mirror   *mirror
	rates    *rates
	hot      *hif.Manager // nil: none
	divided  *divided
	closing  sync.Once
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the store and takes up what an earlier run left to do. It returns
// before that work is done.
//
// Errors: those of [tier.Open]; ErrFailedPrecondition for a database of a
// newer version; ErrUnavailable-classed errors where the kernel lacks something.
func New(ctx context.Context, c Config) (_ *Snapshotter, err error) {
	if c.Policy == nil {
		return nil, fmt.Errorf("no placement policy given: %w", errdefs.ErrInvalidArgument)
	}
	if c.Workers == 0 {
		c.Workers = 2
	}
	if c.Poll == 0 {
		c.Poll = 50 * time.Millisecond
	}
	if c.Reserve == nil {
		c.Reserve = func(total int64) int64 { return total / 20 }
	}
	if c.State == "" {
		c.State = filepath.Join(c.Root, "run")
	}
	if c.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("read the boot id: %w", err)
		}
		c.BootID = strings.TrimSpace(string(b))
	}
	s := &Snapshotter{config: c}
	if s.tiers, err = tier.Open(c.Root, c.NVMRoot, c.State); err != nil {
		return nil, err
	}
	if s.tiers.SameFilesystem() {
		log.G(ctx).Warnf("root %q and nvm_root %q stand on one filesystem: placement has no effect; give NVM a filesystem of its own", c.Root, c.NVMRoot)
	}
	for _, dir := range []string{s.path("m"), s.path("t"), filepath.Join(s.tiers.Root(placement.NVM), "t"), s.state("t"), s.state(idmappedDir), s.state(unmappedDir), s.state("p"), filepath.Join(s.tiers.Root(placement.NVM), "p")} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("create %q: %w", dir, err)
		}
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("%q is not a directory; remove it or choose another root: %w", dir, errdefs.ErrFailedPrecondition)
		}
	}
	if err := s.linkTrees(); err != nil {
		return nil, fmt.Errorf("link the directories of trees: %w", err)
	}
	if s.features, err = s.probe(ctx); err != nil {
		return nil, err
	}
	if err := s.restoreDatabase(ctx); err != nil {
		return nil, err
	}
	if s.db, err = openDatabase(ctx, s.tiers.Root(placement.NVM)); err != nil {
		return nil, err
	}
	if _, total, err := s.tiers.Space(placement.NVM); err == nil {
		if err := s.db.ballast(min(databaseBallast, total/4)); err != nil {
			log.G(ctx).WithError(err).Debug("cannot reserve space for the database")
		}
	}
	s.jobs = newJobs(c.Workers)
	s.divided = newDivided(s)
	if s.rates, err = loadRates(ctx, s.db); err != nil {
		return nil, errors.Join(err, s.db.ms.Close())
	}
	s.mirror = newMirror(s.db, s.path(databaseFile), func() bool { return s.placer.busy() || s.starting() })
	s.quota = newQuotas(ctx, s.tiers)
	s.syncer = newSyncer(s)
	s.homing = newHoming(s)
	s.placer = newPlacer(s)
	if err := s.newHot(ctx); err != nil {
		return nil, errors.Join(err, s.mirror.close(), s.db.ms.Close())
	}
	s.syncer.start()
	s.homing.start()
	s.placer.start()
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if s.hot != nil {
		s.hot.Start()
	}
	return s, nil
}

// path is a path below the HDD root.
func (s *Snapshotter) path(elem ...string) string {
	return filepath.Join(append([]string{s.tiers.Root(placement.HDD)}, elem...)...)
}

// state is a path below the state directory.
func (s *Snapshotter) state(elem ...string) string {
	return filepath.Join(append([]string{s.tiers.State()}, elem...)...)
}

// Close ends the background work and closes the database. Nothing is unmounted
// and nothing deleted: containers go on. It may be called twice.
func (s *Snapshotter) Close() (err error) {
	s.closing.Do(func() {
		if s.hot != nil {
			err = s.hot.Close()
		}
		s.placer.close()
		s.homing.close()
		// Before what may take long: who is killed for that should have his copy.
		if e := s.db.copyTo(context.Background(), s.path(databaseFile)); e != nil {
			log.L.WithError(e).Warn("the copy of the database on HDD is out of date")
		}
		s.syncer.final(context.Background())
		s.jobs.close()
		s.syncer.close()
		err = errors.Join(err, s.mirror.close(), s.db.ms.Close(), s.tiers.Close())
	})
	return err
}

// Stat returns the info of an active or committed snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.db.update(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	s.mirror.changed()
	return updated, err
}

// Usage tells the disk usage of a snapshot without its parents. For an active
// one the directory is walked; for a committed one it waits for the capture.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	var id string
	var info snapshots.Info
	err := s.db.view(ctx, func(ctx context.Context, _ *bolt.Tx) (err error) {
		id, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	switch info.Kind {
	case snapshots.KindView:
		return snapshots.Usage{}, nil
	case snapshots.KindActive:
		t, err := s.tiers.StagedOn(id)
		if err != nil {
			return snapshots.Usage{}, err
		}
		du, err := fs.DiskUsage(ctx, filepath.Join(s.tiers.Staging(t, id), "fs"))
		return snapshots.Usage(du), err
	}
	if err := s.bounded(ctx, func(ctx context.Context) error { return s.captured(ctx, key) }); err != nil {
		return snapshots.Usage{}, err
	}
	r, err := s.db.record(ctx, id)
	return r.Usage, err
}

// Walk calls fn for each snapshot that matches one of the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return walk(ctx, tx, fn, filters...)
	})
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
// tree of the parent where that is not there yet.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var sn storage.Snapshot
	var info snapshots.Info
	var r record
	err := s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if sn, err = storage.GetSnapshot(ctx, key); err != nil {
			return fmt.Errorf("get mounts: %w", err)
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		r, err = getRecord(tx, sn.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(ctx, sn, info, r)
}

// Commit turns an active snapshot into a committed one: one rename and one
// transaction. containerd holds its own write transaction meanwhile, so that
// nothing here may call it.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var id string
	var committed, damaged bool
	var on placement.Tier
	start := time.Now()
	err := s.db.view(ctx, func(ctx context.Context, _ *bolt.Tx) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	// From here on nobody swings the link.
	decision := s.placer.committing(ctx, id)
	err = s.db.update(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		// Usage is not known before the capture; Usage takes it from the record.
		if id, err = storage.CommitActive(ctx, key, name, snapshots.Usage{}, opts...); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		r, err := getRecord(tx, id)
		if err != nil {
			return err
		}
		if on, err = s.tiers.Commit(id); err != nil {
			return err
		}
		committed = true
		r.Tier, r.Boot = on, s.config.BootID
		r.UIDMap, r.GIDMap = "", ""
		if decision != nil {
			r.Decision = decision
		}
		damaged = r.Damaged != ""
		return putRecord(tx, id, r)
	})
	if err != nil {
		if committed {
			err = errors.Join(err, s.tiers.Uncommit(id, on))
		}
		return err
	}
	s.placer.committed(id, on)
	s.mirror.changed()
	if damaged {
		s.repairLater(id, name)
	} else {
		s.settle(id, name)
	}
	log.G(ctx).WithFields(log.Fields{"id": id, "name": name, "tier": on.String(), "took": time.Since(start)}).Debug("committed")
	return nil
}

// Remove forgets a snapshot; its files go in the background.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.db.update(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if id, _, err = storage.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove snapshot %q: %w", key, err)
		}
		return moveToRemoved(tx, id)
	})
	if err != nil {
		return err
	}
	s.placer.removed(id)
	s.mirror.changed()
	if s.config.SyncRemove {
		return s.jobs.do(ctx, "remove "+id, s.removal(id))
	}
	s.jobs.add("remove "+id, s.removal(id))
	return nil
}

// Cleanup waits until the files of all removed snapshots are gone.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	ids, err := s.db.removed(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		err = errors.Join(err, s.jobs.do(ctx, "remove "+id, s.removal(id)))
	}
	return err
}
