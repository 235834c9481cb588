// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// rebuildTimeout bounds the unpacking of one layer from containerd's blobs: a
// containerd that hangs must not hang us.
const rebuildTimeout = 15 * time.Minute

// LayerSource opens the blob of a layer in containerd's content store;
// implemented by [pull.Watcher]. Layers lost in a crash are rebuilt from it.
type LayerSource interface {
	OpenLayer(ctx context.Context, namespace, chainID string) (pull.LayerInfo, io.ReadCloser, error)
}

// probe asks the kernel what it can do, once, by trial mounts on NVM, or on
// HDD where NVM has no room for them.
func (s *Snapshotter) probe(ctx context.Context) (f host.Features, err error) {
	image := host.Image()
	for _, t := range tier.Tiers {
		if f, err = host.Probe(s.tiers.Root(t), image); err == nil {
			break
		}
		log.G(ctx).WithError(err).Debugf("trial mounts on %s", t)
	}
	if err != nil {
		return f, err
	}
	if err := f.Check(); err != nil {
		return f, err
	}
	log.G(ctx).WithField("features", fmt.Sprintf("%+v", f)).Debug("kernel probed")
	return f, nil
}

// restoreDatabase puts the copy of the database into an NVM root that has none.
// An empty file is none too: bolt would begin a new database in it, and all
// layers would be garbage.
func (s *Snapshotter) restoreDatabase(ctx context.Context) error {
	path, saved := filepath.Join(s.tiers.Root(placement.NVM), databaseFile), s.path(databaseFile)
	if st, err := os.Lstat(path); err == nil && st.Size() > 0 {
		return nil
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	in, err := os.Open(saved)
	if errors.Is(err, os.ErrNotExist) {
		// Without a database every layer would be garbage.
		if empty, err := s.tiers.Empty(); err != nil || empty {
			return err
		}
		return fmt.Errorf("there are layers below %q and %q but no database, neither %q nor its copy %q; put one of them back, or empty both roots to begin anew: %w",
			s.tiers.DataRoot(placement.NVM), s.tiers.DataRoot(placement.HDD), path, saved, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("open the copy of the database: %w", err)
	}
	defer in.Close()
	log.G(ctx).Warnf("NVM root %q holds no database: it was lost or replaced; restoring from the copy %q", s.tiers.Root(placement.NVM), saved)
	// The mark comes first: a start that ends between the two must not sweep.
	if err := tier.WriteFile(s.restoredMark(), func(*os.File) error { return nil }); err != nil {
		return fmt.Errorf("restore database: %w", err)
	}
	err = tier.WriteFile(path, func(out *os.File) error {
		_, err := io.Copy(out, in)
		return err
	})
	if err != nil {
		return fmt.Errorf("restore database: %w", err)
	}
	return nil
}

// restoredMark is a file that stands in the NVM root from a restore of the
// database on: the copy may have been older than the store, so that what it does
// not know is no garbage. Whoever is sure that it is deletes the file.
func (s *Snapshotter) restoredMark() string {
	return filepath.Join(s.tiers.Root(placement.NVM), "restored")
}

// recover takes up what an earlier run left: work that was not done, layers
// that a crash may have torn, files that nothing refers to.
func (s *Snapshotter) recover(ctx context.Context) error {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return fmt.Errorf("read database: %w", err)
	}
	removed, err := s.db.removed(ctx)
	if err != nil {
		return fmt.Errorf("read database: %w", err)
	}
	// First what may take nothing that is being made: no work has begun.
	found, err := s.inventory()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	damaged := false
	for _, sn := range all {
		known[sn.ID] = true
		if sn.Info.Kind != snapshots.KindCommitted {
			if err := s.recoverActive(ctx, sn); err != nil {
				log.G(ctx).WithError(err).WithField("id", sn.ID).Warnf("snapshot %q cannot be used", sn.Info.Name)
			}
			continue
		}
		whole, err := s.recoverLayer(ctx, sn)
		if err != nil {
			return err
		}
		damaged = damaged || !whole
	}
	if damaged {
		s.detachTrees(ctx)
	}
	s.dropFormerState(ctx)
	s.dropLooks(ctx, s.state())
	s.divided.recover(ctx)
	for _, id := range removed {
		known[id] = true
		s.jobs.add("remove "+id, s.removal(id))
	}
	if err := s.sweep(ctx, found, known); err != nil {
		return err
	}
	s.homing.kick()
	s.mirror.changed()
	return nil
}

// recoverActive takes back a commit that did not reach the database.
func (s *Snapshotter) recoverActive(ctx context.Context, sn snapshot) error {
	if sn.Info.Kind != snapshots.KindActive {
		return nil
	}
	if t, err := s.tiers.StagedOn(sn.ID); err == nil {
		if isExtraction(sn.Info.Name) {
			s.placer.resumed(sn.ID, t)
			return s.tiers.Link(sn.ID, t) // the state directory may be new
		}
		return nil
	}
	for _, t := range tier.Tiers {
		if st, err := os.Lstat(s.tiers.Data(t, sn.ID)); err == nil && st.IsDir() {
			log.G(ctx).WithField("id", sn.ID).Info("taking back an interrupted commit")
			err := s.tiers.Uncommit(sn.ID, t)
			if err == nil && isExtraction(sn.Info.Name) {
				s.placer.resumed(sn.ID, t)
				err = s.tiers.Link(sn.ID, t)
			}
			return err
		}
	}
	log.G(ctx).WithField("id", sn.ID).Warnf("the writable directory of snapshot %q is gone", sn.Info.Name)
	return nil
}

// detachTrees takes all trees down, to be mounted again by who needs them. A
// running container has a clone of its own and does not notice.
func (s *Snapshotter) detachTrees(ctx context.Context) {
	trees, err := filepath.Glob(s.state("t", "*"))
	for _, dir := range trees {
		err = errors.Join(err, unmount(dir))
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot take trees down")
	}
}

// recoverLayer decides what is to be done for a committed layer, and tells
// whether it is whole.
func (s *Snapshotter) recoverLayer(ctx context.Context, sn snapshot) (whole bool, err error) {
	damage := sn.Damaged
	if damage == "" && !sn.Durable && sn.Boot != s.config.BootID {
		damage = "the machine went down before it was on the disk"
	}
	if _, err := os.Lstat(s.tiers.Data(sn.Tier, sn.ID)); damage == "" && err != nil {
		switch _, home := os.Lstat(s.tiers.Data(placement.HDD, sn.ID)); {
		case sn.Tier == placement.NVM && sn.Home && home == nil:
			// NVM was lost, and was only faster.
			if err := s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Tier = placement.HDD }); err != nil {
				return false, err
			}
			sn.Tier = placement.HDD
		case sn.Tier == placement.NVM:
			damage = "its data were on an NVM device that was lost"
		default:
			damage = fmt.Sprintf("its data directory on %s is gone", sn.Tier)
		}
	}
	if _, err := os.Lstat(s.capturePath(sn.ID)); damage == "" && err != nil {
		sn.Captured = false
		if sn.Tier == placement.HDD && sn.Home {
			damage = "its metadata are gone, and its copy on HDD holds data only"
		}
	}
	if damage != "" {
		if damage != sn.Damaged {
			log.G(ctx).WithField("id", sn.ID).Warnf("layer %q has to be rebuilt: %s", sn.Info.Name, damage)
			err := s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Damaged, r.Durable, r.Captured = damage, false, false })
			if err != nil {
				return false, err
			}
		}
		s.repairLater(sn.ID, sn.Info.Name)
		return false, nil
	}
	if !sn.Captured {
		if err := s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Captured = false }); err != nil {
			return false, err
		}
	}
	switch {
	case !sn.Captured:
		s.settle(sn.ID, sn.Info.Name)
	case !sn.Durable:
		s.syncer.add(sn.ID, sn.Info.Name, sn.Tier, sn.Data)
	}
	return true, nil
}

// repairLater repairs a layer in the background. containerd may not be there
// yet: then it is tried again.
func (s *Snapshotter) repairLater(id, name string) {
	s.jobs.addUntilDone("repair "+id, s.repair(id, name), errdefs.IsUnavailable)
}

// condemn marks the layers damaged that may have lost something when a tier
// reported an error: all that are not durable. Captures stand on HDD, so an
// error there concerns every layer.
func (s *Snapshotter) condemn(ctx context.Context, t placement.Tier, why string) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		log.G(ctx).WithError(err).Error("cannot tell which layers an error of a device concerns")
		return
	}
	for _, sn := range all {
		committed := sn.Info.Kind == snapshots.KindCommitted
		// What was copied of it so far may be torn, whatever the size of the files says.
		if t == placement.HDD && sn.Homing != "" && !sn.Home {
			if err := s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Homing = "" }); err != nil {
				log.G(ctx).WithError(err).Error("cannot record that copying a layer has to begin anew")
			}
		}
		if sn.Durable || sn.Damaged != "" || (!committed && !isExtraction(sn.Info.Name)) || (t == placement.NVM && sn.Tier != t) {
			continue
		}
		err := s.db.updateRecord(ctx, sn.ID, func(r *record) { r.Damaged, r.Captured, r.Durable = why, false, false })
		if err != nil {
			log.G(ctx).WithError(err).Error("cannot record that a layer is damaged")
			continue
		}
		if !committed {
			continue // its commit sees to it
		}
		if sn.Repairs >= mostRepairs {
			log.G(ctx).Errorf("layer %q was rebuilt %d times and its device fails again; it is left to who needs it", sn.Info.Name, sn.Repairs)
			continue
		}
		s.repairLater(sn.ID, sn.Info.Name)
	}
	s.detachTrees(ctx)
}

// mostRepairs bounds how often a layer is rebuilt without being asked for.
const mostRepairs = 3

// repair rebuilds a layer on HDD from its blob in the content store.
func (s *Snapshotter) repair(id, name string) func(context.Context) error {
	return func(ctx context.Context) error {
		r, err := s.db.record(ctx, id)
		if errdefs.IsNotFound(err) || (err == nil && r.Damaged == "") {
			return nil
		}
		if err != nil {
			return err
		}
		err = s.rebuild(ctx, id, name, r)
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		if errdefs.IsUnavailable(err) {
			return fmt.Errorf("layer %q is damaged, %s, and waits for containerd to be rebuilt: %w", name, r.Damaged, err)
		}
		if err != nil {
			return fmt.Errorf("layer %q cannot be used, %s, and could not be rebuilt (%w); remove the image and pull it again: %w",
				name, r.Damaged, err, errdefs.ErrDataLoss)
		}
		err = s.db.updateRecord(ctx, id, func(r *record) {
			r.Damaged, r.Tier, r.Boot, r.Home, r.Durable, r.Captured = "", placement.HDD, s.config.BootID, false, false, false
			r.Mixed, r.NVMBytes = false, 0 // all of it was removed
			r.Repairs++
		})
		if err != nil {
			return err
		}
		log.G(ctx).WithField("id", id).Infof("layer %q rebuilt", name)
		s.settle(id, name)
		return nil
	}
}

func (s *Snapshotter) rebuild(ctx context.Context, id, name string, r record) error {
	ctx, cancel := context.WithTimeout(ctx, rebuildTimeout)
	defer cancel()
	source, ok := s.config.Downloads.(LayerSource)
	if !ok || r.ChainID == "" {
		return errors.New("it came from no blob")
	}
	layer, blob, err := source.OpenLayer(ctx, r.Namespace, r.ChainID)
	if err != nil {
		return err
	}
	defer blob.Close()
	tar, err := compression.DecompressStream(blob)
	if err != nil {
		return err
	}
	defer tar.Close()
	// The layers below come first: owners of parent directories are taken from them.
	if _, err := s.parentCaptures(ctx, name); err != nil {
		return err
	}
	ids, err := s.db.chain(ctx, name)
	if err != nil {
		return err
	}
	parents := s.ownDirs(ids[1:])
	staged, err := s.tiers.Prestage(placement.HDD, 0, 0)
	if err != nil {
		return err
	}
	defer func() {
		if e := s.tiers.Unprestage(placement.HDD, staged); e != nil {
			log.G(ctx).WithError(e).Warn("cannot clear up after a rebuild")
		}
	}()
	sum := digest.Canonical.Digester()
	in := io.TeeReader(tar, sum.Hash())
	opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
	if len(parents) > 0 {
		opts = append(opts, archive.WithParents(parents))
	}
	if _, err := archive.Apply(ctx, filepath.Join(s.tiers.Staging(placement.HDD, staged), "fs"), in, opts...); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if got := sum.Digest(); got != layer.DiffID {
		return fmt.Errorf("blob %s unpacks to %s, not %s", layer.Digest, got, layer.DiffID)
	}
	// Only now the old one goes: until here it may have been better than nothing.
	if err := errors.Join(unmount(s.state("t", id)), s.divided.forget(id), s.tiers.Remove(id)); err != nil {
		return err
	}
	for _, image := range s.treeImages(id) {
		os.Remove(image)
	}
	if err := s.tiers.Stage(id, placement.HDD, staged); err != nil {
		return err
	}
	_, err = s.tiers.Commit(id)
	return err
}
