// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// restoreDatabase puts the copy of the database into an NVM root that has none.
// An empty file is none too: bolt would begin a new database in it, and all
// layers would be garbage.
func (s *Store) restoreDatabase(ctx context.Context) error {
	path, saved := filepath.Join(s.Tiers.Root(placement.NVM), databaseFile), s.path(databaseFile)
	if st, err := os.Lstat(path); err == nil && st.Size() > 0 {
		return nil
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	in, err := os.Open(saved)
	if errors.Is(err, os.ErrNotExist) {
		// Without a database every layer would be garbage.
		packs, err := s.packs()
		if err != nil || len(packs) == 0 {
			return err
		}
		return fmt.Errorf("there are packs below %q but no database, neither %q nor its copy %q; put one of them back, or empty both roots to begin anew: %w",
			s.path("p"), path, saved, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("open the copy of the database: %w", err)
	}
	defer in.Close()
	log.G(ctx).Warnf("NVM root %q holds no database: it was lost or replaced; restoring from the copy %q", s.Tiers.Root(placement.NVM), saved)
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
func (s *Store) restoredMark() string {
	return filepath.Join(s.Tiers.Root(placement.NVM), "restored")
}

// packs lists the layers that have a file among the packs, and clears away what
// an earlier run left half-made.
func (s *Store) packs() (ids []LayerID, err error) {
	entries, err := os.ReadDir(s.path("p"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			os.Remove(s.path("p", e.Name()))
			continue
		}
		if id, ok := parseLayer(strings.TrimSuffix(e.Name(), ".erofs")); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// recover takes up what an earlier run left: it is next for all layers, after
// what nothing refers to has been swept.
func (s *Store) recover(ctx context.Context) error {
	records, err := s.loadLayers(ctx)
	if err != nil {
		return err
	}
	if err := s.sweep(ctx); err != nil {
		return err
	}
	if s.Tiers.Former() != "" {
		if err := s.wholeInSpiteOf(ctx, records); err != nil {
			return err
		}
	}
	s.dropFormerState(ctx)
	s.views.recoverParts(ctx)
	removed, err := s.db.removed(ctx)
	if err != nil {
		return fmt.Errorf("read database: %w", err)
	}
	for _, id := range removed {
		s.removeLater(id)
	}
	for _, l := range records {
		if l.State != Stored || l.Boot == s.config.BootID || l.Damaged != "" {
			continue
		}
		// Before anybody can ask: a view may still stand that needs the pack.
		if err := s.markDamaged(ctx, l.ID, powerCut); err != nil {
			return err
		}
	}
	if err := s.countLost(ctx, records); err != nil {
		return err
	}
	for _, l := range records {
		s.exec.kick(l.ID)
	}
	s.mirror.changed()
	return nil
}

// countLost corrects the records of layers whose files on NVM are gone with their device.
func (s *Store) countLost(ctx context.Context, records []Layer) error {
	for _, l := range records {
		if l.NVM == 0 {
			continue
		}
		if _, err := os.Lstat(s.Tiers.LayerData(l.ID.String())); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := s.updateLayer(ctx, l.ID, func(l *Layer) { l.NVM = 0 }); err != nil {
			return fmt.Errorf("count what layer %s has on NVM: %w", l.ID, err)
		}
	}
	return nil
}

// loadLayers reads all records of layers and counts their users anew.
func (s *Store) loadLayers(ctx context.Context) (all []Layer, err error) {
	users := map[LayerID]int{}
	err = s.db.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		err := own(tx, bucketSnapshots).ForEach(func(k, _ []byte) error {
			sn, err := GetSnapshot(tx, string(k))
			if err == nil && sn.Layer != 0 {
				users[sn.Layer]++
			}
			return err
		})
		if err != nil {
			return err
		}
		var wrong []Layer
		err = own(tx, bucketLayers).ForEach(func(k, _ []byte) error {
			id, ok := parseLayer(string(k))
			if !ok {
				return fmt.Errorf("the database has a layer called %q: %w", k, errdefs.ErrDataLoss)
			}
			l, err := getLayer(tx, id)
			if err != nil {
				return err
			}
			if l.Users != users[id] {
				log.G(ctx).WithField("layer", id).Warnf("%d snapshots use a layer of which the database counts %d", users[id], l.Users)
				l.Users = users[id]
				wrong = append(wrong, l)
			}
			all = append(all, l)
			return nil
		})
		for _, l := range wrong {
			err = errors.Join(err, putLayer(tx, l))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read database: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range all {
		s.remember(l)
	}
	return all, nil
}

// wholeInSpiteOf finds the layers whose packs are whole though the restored
// database says that they have holes: it is older than the last filling.
func (s *Store) wholeInSpiteOf(ctx context.Context, records []Layer) error {
	for _, l := range records {
		if l.State != Durable || l.Holes == 0 || l.Damaged != "" {
			continue
		}
		f, err := os.OpenFile(s.PackPath(l.ID), os.O_RDWR, 0)
		if err != nil {
			continue // next finds it
		}
		err = f.Sync() // who filled it may have died before that
		forget(f, 0, 0)
		f.Close()
		if err != nil {
			continue
		}
		p, err := pack.Open(s.PackPath(l.ID))
		if err != nil {
			continue
		}
		index, err := p.Index()
		if err == nil {
			hole := map[uint32]bool{}
			for _, n := range holes(index) {
				hole[n] = true
			}
			err = p.Verify(ctx, func(int) error { return nil }, func(n uint32) bool { return !hole[n] })
		}
		p.Close()
		if err != nil {
			continue
		}
		if err := s.updateLayer(ctx, l.ID, func(l *Layer) { l.State, l.NVM = Home, 0 }); err != nil {
			return err
		}
	}
	return nil
}
