// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const (
	// yield is how long filling waits before it looks again whether a pull or start is over.
	yield = time.Second
	// yieldToStarts bounds that for starts, at each piece: where one follows on the
	// other all day, packs must become whole all the same.
	yieldToStarts = 5 * time.Second
)

// fill copies the files of a layer that stand on NVM alone into their holes, in
// the order of the pack, and syncs it. Nobody reads a hole meanwhile, since NVM is
// asked first. From then on the layer is at home on HDD.
func (s *Store) fill(ctx context.Context, rec Layer) error {
	path := s.PackPath(rec.ID)
	p, err := pack.Open(path)
	if err != nil {
		return fmt.Errorf("fill pack of layer %s: %w", rec.ID, err)
	}
	index, err := p.Index()
	p.Close()
	if err != nil {
		return fmt.Errorf("fill pack of layer %s: %w", rec.ID, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("fill pack of layer %s: %w", rec.ID, err)
	}
	defer f.Close()
	start, bytes := time.Now(), int64(0)
	for _, n := range holes(index) {
		e, _ := index.At(n)
		err := s.fillOne(ctx, f, rec.ID, n, e, s.pace(ctx, rec.ID))
		if s.needless(rec.ID) {
			return nil // its next step is another one
		}
		if err != nil {
			return err
		}
		bytes += e.Size
	}
	if err := s.filled(ctx, rec, f); err != nil {
		return err
	}
	log.G(ctx).WithFields(log.Fields{"layer": rec.ID, "bytes": bytes, "took": time.Since(start)}).Info("pack is whole")
	return nil
}

// needless reports whether the pack of a layer need not be filled any more: it is to be removed, or unpacked anew.
func (s *Store) needless(id LayerID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.layers[id]
	return l == nil || l.rec.Damaged != "" || l.rec.Users == 0 && l.rec.Used && l.holds <= 0
}

// errNeedless ends a filling in the midst of a file.
var errNeedless = fmt.Errorf("the pack need not be filled any more: %w", errdefs.ErrAborted)

// holes lists the numbers of files that were holes, in the order of the pack.
func holes(index pack.Index) (numbers []uint32) {
	for n := uint32(1); n <= index.Len(); n++ {
		if e, ok := index.At(n); ok && e.Hole {
			numbers = append(numbers, n)
		}
	}
	slices.SortFunc(numbers, func(a, b uint32) int {
		x, _ := index.At(a)
		y, _ := index.At(b)
		return int(int64(x.Block) - int64(y.Block))
	})
	return numbers
}

func (s *Store) fillOne(ctx context.Context, f *os.File, id LayerID, n uint32, e pack.Extent, pace func(int) error) error {
	in, err := os.Open(s.Tiers.DataFile(id.String(), n))
	if errors.Is(err, os.ErrNotExist) { // where the pack has a hole
		return errors.Join(err, s.markDamaged(ctx, id, fmt.Sprintf("file %d is gone from NVM, where its only copy stood", n)))
	}
	if err != nil {
		return fmt.Errorf("fill pack of layer %s: file %d: %w", id, n, err)
	}
	defer in.Close()
	// Pages of an earlier try that could not be written must not be written over in
	// the cache: ext4 takes their extents for written then, and leaves them marked as
	// never written (seen on Linux 6.18).
	forget(f, e.Offset(), e.Size)
	// What is cached afterwards would seem to be touched by the start that is traced
	// next.
	err = pack.Fill(ctx, f, e, tier.Passing(in, 0), pace)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("HDD root %q is full; free space there: %w", s.Tiers.Root(placement.HDD), err)
	case errdefs.IsDataLoss(err):
		// The only copy is damaged.
		return errors.Join(err, s.markDamaged(ctx, id, fmt.Sprintf("file %d on NVM is not what was unpacked", n)))
	case err != nil:
		return fmt.Errorf("fill pack of layer %s: file %d: %w", id, n, err)
	}
	return nil
}

// filled syncs a pack and records that it is whole.
func (s *Store) filled(ctx context.Context, rec Layer, f *os.File) error {
	s.syncs.mu.Lock()
	defer s.syncs.mu.Unlock()
	if err := f.Sync(); err != nil {
		// What stands on NVM is good. The pack is filled again: its pages count as clean, not as written.
		return fmt.Errorf("sync pack of layer %s: %w", rec.ID, err)
	}
	return s.updateLayer(ctx, rec.ID, func(l *Layer) {
		if l.State == Durable {
			l.State = Home
		}
	})
}

// pace lets a piece be copied when no pull and no start is under way and the rate
// allows it, and ends it when nobody needs the layer.
func (s *Store) pace(ctx context.Context, id LayerID) func(int) error {
	limit := rate.NewLimiter(rate.Inf, 0)
	if r := s.config.WriteBackRate; r > 0 {
		limit = rate.NewLimiter(rate.Limit(r), 1<<20)
	}
	return func(n int) error {
		t := s.config.Traffic
		for since := time.Now(); t != nil && (t.Pulling() || (t.Starting() && time.Since(since) < yieldToStarts)); {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(yield):
			}
			if s.needless(id) {
				return errNeedless
			}
		}
		if s.needless(id) {
			return errNeedless
		}
		return limit.WaitN(ctx, n)
	}
}
