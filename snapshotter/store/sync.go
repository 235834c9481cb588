// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
)

// syncs is the one place where layers are brought to their devices. mu is held
// around the sync itself, the look at its error and the marking of what the error
// concerns: the kernel reports an error once for each descriptor and takes the
// pages for clean afterwards, so a second sync would succeed and prove nothing.
type syncs struct{ mu sync.Mutex }

// openPack is the descriptor by which a pack was written. It is the one that
// sees every error of writing it.
type openPack struct{ file *os.File }

func (s *Store) keepPack(id LayerID, f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil {
		if l.pack != nil {
			l.pack.file.Close()
		}
		l.pack = &openPack{f}
		return
	}
	f.Close()
}

// dropPack closes the descriptor of a pack that nobody will sync.
func (s *Store) dropPack(id LayerID) {
	if f := s.takePack(id); f != nil {
		_ = s.flusher.finish(f) // its layer is gone
		f.Close()
	}
}

func (s *Store) takePack(id LayerID) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.layers[id]
	if l == nil || l.pack == nil {
		return nil
	}
	f := l.pack.file
	l.pack = nil
	return f
}

func (s *Store) closePacks() {
	for _, l := range s.Layers() {
		s.dropPack(l.ID)
	}
}

// sync makes all layers durable that are stored, with one sync of NVM and of the
// directory of packs for all of them, and the packs one by one. Who has an error
// is marked damaged.
func (s *Store) sync(ctx context.Context) error {
	s.syncs.mu.Lock()
	defer s.syncs.mu.Unlock()
	var batch []Layer
	onNVM := false
	for _, l := range s.Layers() {
		if l.State == Stored && l.Damaged == "" {
			batch = append(batch, l)
			onNVM = onNVM || l.NVM > 0
		}
	}
	if len(batch) == 0 {
		return nil
	}
	slices.SortFunc(batch, func(a, b Layer) int { return int(a.ID) - int(b.ID) })
	if onNVM {
		if err := s.Tiers.Sync(placement.NVM); err != nil {
			return s.damage(ctx, batch, func(l Layer) bool { return l.NVM > 0 }, placement.NVM, err)
		}
	}
	var done []LayerID
	for _, l := range batch {
		if err := s.syncPack(l.ID); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue // removed meanwhile, or next sees it
			}
			if err := s.damage(ctx, []Layer{l}, nil, placement.HDD, err); err != nil {
				return err
			}
			continue
		}
		done = append(done, l.ID)
	}
	if err := syncDir(s.path("p")); err != nil {
		return s.damage(ctx, batch, nil, placement.HDD, err)
	}
	return s.markDurable(ctx, done)
}

// syncPack brings one pack to the disk. Called with syncs.mu held.
func (s *Store) syncPack(id LayerID) error {
	f := s.takePack(id)
	if f == nil {
		var err error
		if f, err = os.OpenFile(s.PackPath(id), os.O_RDWR, 0); err != nil {
			return err
		}
	}
	defer f.Close()
	return errors.Join(s.flusher.finish(f), f.Sync())
}

// damage marks the layers of a batch that an error of a device concerns.
func (s *Store) damage(ctx context.Context, batch []Layer, concerns func(Layer) bool, t placement.Tier, cause error) error {
	if errdefs.IsUnavailable(cause) {
		return cause // the store is closing
	}
	log.G(ctx).WithError(cause).Errorf("what was written to %s may not be there", t)
	for _, l := range batch {
		if concerns != nil && !concerns(l) {
			continue
		}
		why := fmt.Sprintf("its device, %s, reported an error while it was written (%v)", t, cause)
		if err := s.markDamaged(ctx, l.ID, why); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func (s *Store) markDurable(ctx context.Context, ids []LayerID) error {
	var done []LayerID
	err := s.db.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		done = done[:0]
		for _, id := range ids {
			l, err := getLayer(tx, id)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return err
			}
			if l.State != Stored || l.Damaged != "" {
				continue
			}
			if l.State = Durable; l.Holes == 0 {
				l.State = Home
			}
			if err := putLayer(tx, l); err != nil {
				return err
			}
			done = append(done, id)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that layers are durable: %w", err)
	}
	s.changed(done...)
	s.Rates.save(ctx)
	log.G(ctx).WithField("layers", len(done)).Debug("durable")
	return nil
}

// syncAll makes everything durable when the daemon ends.
func (s *Store) syncAll(ctx context.Context) {
	if err := s.sync(ctx); err != nil {
		log.G(ctx).WithError(err).Error("not all layers are durable")
	}
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
