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
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
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
		var err error
		if batch, err = s.syncNVM(ctx, batch); err != nil {
			return err
		}
	}
	var done []LayerID
	for _, l := range batch {
		if err := s.syncPack(ctx, l.ID); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue // removed meanwhile, or next sees it
			}
			if err := s.damage(ctx, []Layer{l}, placement.HDD, err); err != nil {
				return err
			}
			continue
		}
		done = append(done, l.ID)
	}
	if err := syncDir(s.path("p")); err != nil {
		return s.damage(ctx, batch, placement.HDD, err)
	}
	return s.markDurable(ctx, done)
}

// syncNVM brings the files of a batch to NVM and returns the layers of which all
// are there. A failure concerns whoever has written to NVM meanwhile, so also
// layers that come to their sync later: these find it by the count of failures.
// Called with syncs.mu held.
func (s *Store) syncNVM(ctx context.Context, batch []Layer) (good []Layer, err error) {
	cause := s.Tiers.Sync(placement.NVM)
	if errdefs.IsUnavailable(cause) {
		return nil, cause // the store is closing
	}
	s.mu.Lock()
	if cause != nil {
		s.nvmFailures++
	}
	var torn []Layer
	for _, rec := range batch {
		if l := s.layers[rec.ID]; l != nil && rec.NVM > 0 && l.nvmFailures != s.nvmFailures {
			torn = append(torn, rec)
		} else {
			good = append(good, rec)
		}
	}
	s.mu.Unlock()
	if len(torn) == 0 {
		return good, nil
	}
	if cause == nil {
		cause = errors.New("a sync failed before the layer was stored")
	}
	return good, s.damage(ctx, torn, placement.NVM, cause)
}

// syncPack brings one pack to the disk. Called with syncs.mu held.
func (s *Store) syncPack(ctx context.Context, id LayerID) error {
	if f := s.takePack(id); f != nil {
		defer f.Close()
		return errors.Join(s.flusher.finish(f), f.Sync())
	}
	f, err := os.OpenFile(s.PackPath(id), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return s.readBack(ctx, id, f)
}

// readBack compares what the devices have of a layer with what was unpacked. The
// daemon that wrote it was killed, and with it went the descriptors that were told
// of errors: a later sync succeeds in spite of them.
func (s *Store) readBack(ctx context.Context, id LayerID, f *os.File) error {
	forget(f, 0, 0)
	p, err := pack.Open(f.Name())
	if err != nil {
		return err
	}
	defer p.Close()
	index, err := p.Index()
	if err != nil {
		return err
	}
	if err := p.Verify(ctx, nil, func(n uint32) bool { e, _ := index.At(n); return e.Hole }); err != nil {
		return err
	}
	for e, err := range s.Tiers.OnNVM(id.String()) {
		if err != nil {
			return err
		}
		if want, ok := index.At(e.Number); ok {
			if err := s.readBackNVM(id, e.Number, want.Sum); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) readBackNVM(id LayerID, n, sum uint32) error {
	f, err := os.Open(s.Tiers.DataFile(id.String(), n))
	if err != nil {
		return err
	}
	defer f.Close()
	forget(f, 0, 0)
	got, err := pack.SumOf(f)
	if err == nil && got != sum {
		err = fmt.Errorf("file %d on NVM has checksum %08x, and should have %08x: %w", n, got, sum, errdefs.ErrDataLoss)
	}
	return err
}

// forget drops from the page cache what is clean of a file; n bytes, 0: to the end.
func forget(f *os.File, off, n int64) {
	_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_DONTNEED) // a hint
}

// damage marks layers that an error of a device concerns.
func (s *Store) damage(ctx context.Context, concerned []Layer, t placement.Tier, cause error) error {
	if errdefs.IsUnavailable(cause) {
		return cause // the store is closing
	}
	log.G(ctx).WithError(cause).Errorf("what was written to %s may not be there", t)
	for _, l := range concerned {
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
