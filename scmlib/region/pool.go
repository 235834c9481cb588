// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// The pool holds regions of zeros, written and synced, in directories SIZE-RANDOM, with room for metadata. One that is taken as it is has its metadata on
// the medium before its new name, so both places are looked at after a crash. One that is to have content leaves the pool before the first byte is written:
// what stands in the pool without metadata is given to the next container of any namespace.

func (s *Store) findPool() error {
	base := filepath.Join(s.root, "pool")
	entries, err := os.ReadDir(base)
	if err != nil {
		return fmt.Errorf("read pool of regions: %w", err)
	}
	owned := map[string]Record{}
	for _, e := range entries {
		dir := filepath.Join(base, e.Name())
		size, ok := poolSize(e.Name())
		st, serr := os.Lstat(filepath.Join(dir, "data"))
		ok = ok && serr == nil && st.Mode().IsRegular() && st.Size() == size
		r, free, err := claimed(dir)
		switch {
		case ok && err == nil && free && !writtenTo(dir, st) && len(s.pool[size]) < s.o.Pool[size]:
			s.pool[size] = append(s.pool[size], dir)
		case ok && err == nil && !free && r.Size == size:
			owned[dir] = r
		default:
			if err := unlessLeft(s.erase(dir)); err != nil {
				return fmt.Errorf("clear pool of regions: %w", err)
			}
		}
	}
	return s.restoreOwned(owned)
}

// restoreOwned gives regions their names, which a crash of the machine has lost. Of two that claim the same, the younger took the place of the
// other, whose removal was lost too.
func (s *Store) restoreOwned(owned map[string]Record) error {
	byAge := slices.SortedFunc(maps.Keys(owned), func(a, b string) int { return owned[b].Created.Compare(owned[a].Created) })
	for _, dir := range byAge {
		err := os.Rename(dir, s.dir(owned[dir].Ref))
		if errors.Is(err, os.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
			err = unlessLeft(s.discard(dir))
		}
		if err != nil {
			return fmt.Errorf("restore region %s: %w", owned[dir].Ref, err)
		}
	}
	if len(owned) == 0 {
		return nil
	}
	return syncDir(filepath.Join(s.root, "k"))
}

// writtenTo reports whether data of a directory that nobody claimed was written after its metadata, which is made last: earlier versions wrote content into
// the pool.
func writtenTo(dir string, data os.FileInfo) bool {
	meta, err := os.Lstat(filepath.Join(dir, "meta"))
	return err != nil || data.ModTime().After(meta.ModTime())
}

// leavePool moves a directory out of the pool and returns its new place, from which the next start sweeps it. It is durable when this returns: what is written
// there afterwards may reach the medium at any time, and must not be found in the pool after a loss of power.
func (s *Store) leavePool(dir string) (string, error) {
	away := filepath.Join(s.root, "tmp", randomID())
	if err := os.Rename(dir, away); err != nil {
		return dir, fmt.Errorf("take region from the pool: %w", err)
	}
	return away, errors.Join(syncDir(filepath.Dir(away)), syncDir(filepath.Dir(dir)))
}

func poolSize(name string) (int64, bool) {
	number, _, _ := strings.Cut(name, "-")
	n, err := strconv.ParseInt(number, 10, 64)
	return n, err == nil
}

// takePooled gives a directory from the pool, or "".
func (s *Store) takePooled(size int64) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pool[size]
	if len(have) == 0 {
		return ""
	}
	s.pool[size] = have[:len(have)-1]
	s.taken.Store(true)
	return have[len(have)-1]
}

// drainPool takes all that waits out of the pool. s.mu is held.
func (s *Store) drainPool() (dirs []string) {
	for _, have := range s.pool {
		dirs = append(dirs, have...)
	}
	clear(s.pool)
	return dirs
}

// giveUp makes room of what was in the pool. What cannot be removed now is removed at the next start.
func (s *Store) giveUp(dirs []string) {
	for _, dir := range dirs {
		if err := s.discard(dir); err != nil {
			log.L.WithError(err).Warn("cannot give up a region of the pool")
		}
	}
}

// settle is settleTime once anything was taken: nobody waits at the start.
func (s *Store) settle() time.Duration {
	if s.taken.Load() {
		return settleTime
	}
	return 0
}

// refill wakes the keeper of the pool.
func (s *Store) refill() {
	select {
	case s.fill <- struct{}{}:
	default:
	}
}

// settleTime is for how long nothing must have been taken before the pool is filled again: who takes is a container that is just starting.
const settleTime = time.Second

// keepPool fills the pool whenever it is woken.
func (s *Store) keepPool(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.fill:
		}
		for quiet := false; !quiet && len(s.o.Pool) > 0; {
			select {
			case <-ctx.Done():
				return
			case <-s.fill:
			case <-time.After(s.settle()):
				quiet = true
			}
		}
		for size, want := range s.o.Pool {
			for s.pooled(size) < want && ctx.Err() == nil {
				err := s.addPooled(ctx, size)
				if err == nil {
					continue
				}
				if !errdefs.IsResourceExhausted(err) && !errors.Is(err, context.Canceled) {
					log.G(ctx).WithError(err).Warn("cannot fill the pool of regions")
				}
				break // until the next region comes or goes
			}
		}
	}
}

func (s *Store) pooled(size int64) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pool[size])
}

// Pooled tells how many regions of a size wait.
func (s *Store) Pooled(size int64) int { return s.pooled(size) }

func (s *Store) addPooled(ctx context.Context, size int64) error {
	promise, err := s.reserve(want{size: size, pool: true})
	if err != nil {
		return err
	}
	defer promise.release()
	dir, err := s.scratch()
	if err != nil {
		return err
	}
	err = makeData(ctx, s.slow, dir, size, nil)
	if err == nil {
		err = reserveMeta(dir)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	to := filepath.Join(s.root, "pool", fmt.Sprintf("%d-%s", size, randomID()))
	s.step("pool: made")
	if err := os.Rename(dir, to); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		return errors.Join(err, os.RemoveAll(to))
	}
	promise.kept(func() { s.pool[size] = append(s.pool[size], to) })
	return nil
}
