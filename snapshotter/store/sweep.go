// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

func parseLayer(s string) (LayerID, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return LayerID(n), err == nil && n > 0 && LayerID(n).String() == s
}

// inventory lists what stands in the store: snapshots and layers, by id. Names
// that are not ours are left alone and reported.
func (s *Store) inventory(ctx context.Context) (snapshots map[string]bool, layers map[LayerID]bool, err error) {
	snapshots, layers = map[string]bool{}, map[LayerID]bool{}
	staged, err := s.Tiers.Staged()
	if err != nil {
		return nil, nil, err
	}
	nvm := s.Tiers.Root(placement.NVM)
	for _, dir := range []string{s.path("v"), filepath.Join(nvm, "v"), filepath.Join(nvm, "parts"), s.StatePath("v"), s.StatePath(idmappedDir), s.StatePath(unmappedDir), s.StatePath("p")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, nil, fmt.Errorf("list %q: %w", dir, err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".") {
				os.Remove(filepath.Join(dir, e.Name()))
				continue
			}
			staged = append(staged, strings.TrimSuffix(e.Name(), ".erofs"))
		}
	}
	for _, name := range staged {
		if _, ok := parseLayer(name); ok { // snapshot ids are numbers likewise
			snapshots[name] = true
		} else {
			log.G(ctx).Warnf("%q in the store is not nhybrid's; it is left alone", name)
		}
	}
	packs, err := s.packs()
	if err != nil {
		return nil, nil, err
	}
	for _, id := range packs {
		layers[id] = true
	}
	data, err := s.Tiers.DataLayers()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range data {
		if id, ok := parseLayer(name); ok {
			layers[id] = true
		} else {
			log.G(ctx).Warnf("%q in the data root of NVM is not nhybrid's; it is left alone", name)
		}
	}
	return snapshots, layers, nil
}

// sweep deletes what the database does not know, and makes sure that its ids are
// never given out again.
func (s *Store) sweep(ctx context.Context) error {
	snapshots, layers, err := s.inventory(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	err = s.db.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketSnapshots, bucketRemoved} {
			if err := own(tx, b).ForEach(func(k, _ []byte) error { known[string(k)] = true; return nil }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read database: %w", err)
	}
	var highest, highestLayer uint64
	var garbage []string
	for id := range snapshots {
		if n, err := strconv.ParseUint(id, 10, 64); err == nil {
			highest = max(highest, n)
		}
		if !known[id] && !s.stagedLayer(id) {
			garbage = append(garbage, id)
		}
	}
	var unknown []LayerID
	for id := range layers {
		highestLayer = max(highestLayer, uint64(id))
		if _, err := s.Layer(id); errdefs.IsNotFound(err) {
			unknown = append(unknown, id)
		}
	}
	if err := s.db.passIDs(ctx, highest, highestLayer); err != nil {
		return err
	}
	if _, err := os.Lstat(s.restoredMark()); err == nil && len(garbage)+len(unknown) > 0 {
		slices.Sort(garbage)
		log.G(ctx).Warnf("the database was restored from an older copy and does not know %d snapshots (ids %s) and %d layers whose files stand in the store; if none of them is needed, delete %q and start again",
			len(garbage), strings.Join(garbage, ", "), len(unknown), s.restoredMark())
		return nil
	}
	for _, id := range garbage {
		s.removeLater(id)
	}
	for _, id := range unknown {
		s.jobs.add("sweep layer "+id.String(), func(context.Context) error {
			err := os.Remove(s.PackPath(id))
			if errors.Is(err, os.ErrNotExist) {
				err = nil
			}
			return errors.Join(err, s.Tiers.RemoveData(id.String()))
		})
	}
	return nil
}

// stagedLayer reports whether a layer waits in the staging directory of a snapshot that is gone.
func (s *Store) stagedLayer(snapshot string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.layers {
		if l.rec.State == Staged && l.rec.Snapshot == snapshot {
			return true
		}
	}
	return false
}

// RemoveLater deletes the files of a removed snapshot in the background.
func (s *Store) RemoveLater(id string) { s.removeLater(id) }

// RemoveNow does it, and waits.
func (s *Store) RemoveNow(ctx context.Context, id string) error {
	return s.jobs.do(ctx, "remove "+id, s.removal(id))
}

// Removed lists the removed snapshots of which files may still stand.
func (s *Store) Removed(ctx context.Context) ([]string, error) { return s.db.removed(ctx) }

// UnstageLater deletes the staging directory of a snapshot whose layer stands elsewhere.
func (s *Store) UnstageLater(id string) {
	s.jobs.add("unstage "+id, func(context.Context) error {
		if s.stagedLayer(id) {
			return nil
		}
		s.Quota.Forget(id)
		return s.Tiers.Unstage(id)
	})
}

func (s *Store) removeLater(id string) { s.jobs.add("remove "+id, s.removal(id)) }

// removal deletes what stands of a removed snapshot. Its layer goes by itself
// when no other snapshot uses it.
func (s *Store) removal(id string) func(context.Context) error {
	return func(ctx context.Context) error {
		alive, err := s.HasSnapshot(ctx, id)
		if err != nil {
			return err
		}
		if alive { // an id that lives is nobody's garbage
			return s.db.forgetRemoved(ctx, id)
		}
		err = errors.Join(s.dropIDMapped(id), unmount(s.StatePath("v", id)), s.DropParts(id))
		s.views.forgetReadAhead(id)
		if err == nil {
			for _, f := range s.viewImages(id) {
				if e := os.Remove(f); e != nil && !errors.Is(e, os.ErrNotExist) {
					err = errors.Join(err, e)
				}
			}
		}
		if err == nil && !s.stagedLayer(id) {
			err = s.Tiers.Unstage(id)
		}
		if err != nil {
			return fmt.Errorf("remove files of snapshot id %s: %w", id, err)
		}
		s.Quota.Forget(id)
		return s.db.forgetRemoved(ctx, id)
	}
}

// HasSnapshot reports whether there is a snapshot with an id.
func (s *Store) HasSnapshot(ctx context.Context, id string) (ok bool, err error) {
	err = s.db.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		_, err := GetSnapshot(tx, id)
		if ok = err == nil; errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
	return ok, err
}

// WaitRemoved returns when nothing stands any more of a layer that no snapshot uses and nobody holds.
func (s *Store) WaitRemoved(ctx context.Context) error {
	for _, rec := range s.Layers() {
		for rec.Users == 0 && rec.Used {
			s.mu.Lock()
			l := s.layers[rec.ID]
			if l == nil || l.holds > 0 || l.rec.Users > 0 { // a pull that failed holds its layers for the next try
				s.mu.Unlock()
				break
			}
			changed, last := l.changed, l.last
			s.mu.Unlock()
			if last != nil {
				return last
			}
			s.exec.kick(rec.ID)
			select {
			case <-changed:
			case <-ctx.Done():
				return ctx.Err()
			case <-s.ctx.Done():
				return fmt.Errorf("remove layer %s: the daemon is stopping: %w", rec.ID, errdefs.ErrUnavailable)
			}
		}
	}
	return nil
}

// dropFormerState takes down what was mounted under the id that the store had
// before a new NVM root was adopted. Running containers do not notice.
func (s *Store) dropFormerState(ctx context.Context) {
	s.dropLooks(ctx, s.StatePath())
	if s.Tiers.Former() == "" {
		return
	}
	dir := filepath.Join(filepath.Dir(s.Tiers.State()), s.Tiers.Former())
	s.dropLooks(ctx, dir)
	var err error
	for _, sub := range []string{idmappedDir, "v", "p"} {
		mounts, _ := filepath.Glob(filepath.Join(dir, sub, "*"))
		for _, m := range mounts {
			err = errors.Join(err, unmount(m))
		}
	}
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot take down what was mounted for the lost NVM")
	}
}

// LookPrefix begins the names of directories in the state directory on which
// images are mounted for a look.
const LookPrefix = ".view-"

// dropLooks takes down images that were mounted to be looked at when the daemon
// died: they hold the space of what has left NVM since.
func (s *Store) dropLooks(ctx context.Context, state string) {
	dirs, err := filepath.Glob(filepath.Join(state, LookPrefix+"*"))
	for _, dir := range dirs {
		err = errors.Join(err, mount.UnmountAll(dir, unix.MNT_DETACH), os.Remove(dir))
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot take down an image that was looked at")
	}
}
