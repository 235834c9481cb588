// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// inventory lists the names of all that stands in the store, and clears away
// what an earlier run left half-made.
func (s *Snapshotter) inventory() (map[string]bool, error) {
	found, err := s.tiers.IDs()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{s.path("m"), s.path("t"), filepath.Join(s.tiers.Root(placement.NVM), "t"), filepath.Join(s.tiers.Root(placement.NVM), "p"), s.state("t"), s.state(idmappedDir), s.state(unmappedDir), s.state("p")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", dir, err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".") {
				os.Remove(filepath.Join(dir, e.Name()))
				continue
			}
			found[strings.TrimSuffix(e.Name(), ".erofs")] = true
		}
	}
	return found, nil
}

// sweep deletes what no snapshot refers to. Only what carries a name of ours
// goes; anything else is left alone and reported.
//
// Ids beyond the database's are never given out again, whatever becomes of
// their files: bolt counts inside the transaction, so that one that was not
// committed leaves its id to the next.
func (s *Snapshotter) sweep(ctx context.Context, found, known map[string]bool) error {
	var highest uint64
	var garbage []string
	for id := range found {
		n, err := strconv.ParseUint(id, 10, 64)
		switch {
		case err != nil:
			log.G(ctx).Warnf("%q in the store is not nhybrid's; it is left alone", id)
			continue
		case !known[id]:
			garbage = append(garbage, id)
		}
		highest = max(highest, n)
	}
	for id := range known {
		if n, err := strconv.ParseUint(id, 10, 64); err == nil {
			highest = max(highest, n)
		}
	}
	if err := s.db.passIDs(ctx, highest); err != nil {
		return err
	}
	if _, err := os.Lstat(s.restoredMark()); err == nil && len(garbage) > 0 {
		log.G(ctx).Warnf("the database was restored from an older copy and does not know %d snapshots whose files stand in the store (ids %s); if none of them is needed, delete %q and start again",
			len(garbage), strings.Join(garbage, ", "), s.restoredMark())
		return nil
	}
	for _, id := range garbage {
		s.jobs.add("remove "+id, s.removal(id))
	}
	return nil
}

// dropFormerState takes down what was mounted under the id that the store had
// before a new NVM root was adopted. Running containers do not notice.
func (s *Snapshotter) dropFormerState(ctx context.Context) {
	if s.tiers.Former() == "" {
		return
	}
	dir := filepath.Join(filepath.Dir(s.tiers.State()), s.tiers.Former())
	s.dropLooks(ctx, dir)
	var err error
	for _, sub := range []string{idmappedDir, "t", "p"} {
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

// dropLooks takes down images that were mounted to be looked at when the daemon
// died ([hotStore.View]): they hold the space of what has left NVM since.
func (s *Snapshotter) dropLooks(ctx context.Context, state string) {
	dirs, err := filepath.Glob(filepath.Join(state, lookPrefix+"*"))
	for _, dir := range dirs {
		err = errors.Join(err, mount.UnmountAll(dir, unix.MNT_DETACH), os.Remove(dir))
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot take down an image that was looked at")
	}
}
