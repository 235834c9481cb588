// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"os"
	"path/filepath"
	"syscall"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// space tells what takes the space of each tier, from the database and without
// looking into layers. What is hot is as of the last plan.
func (s backend) space() (out [2][]*control.Space) {
	settled, hot, pinned := map[string]bool{}, int64(0), int64(0)
	if s.hot != nil {
		o := s.hot.Overview()
		settled, hot = o.SettledLayers, o.HotOnNVM
		if engine := s.hot.Engine(); engine != nil {
			pinned = engine.Progress().Pinned
		}
	}
	var ofSettled, unsettled [2]int64
	for _, l := range s.store.Layers() {
		into := &unsettled
		if settled[l.ID.String()] {
			into = &ofSettled
		}
		for t, n := range l.Bytes() {
			into[t] += n
		}
	}
	for _, t := range tier.Tiers {
		add := func(kind string, bytes int64) {
			out[t] = append(out[t], &control.Space{Kind: kind, Bytes: bytes})
		}
		if t == placement.NVM {
			hot = min(hot, ofSettled[t])
			add("hot", hot)
			add("parts", filesIn(filepath.Join(s.store.Tiers.Root(t), "parts")))
			add("cold", ofSettled[t]-hot)
			add("pinned", pinned)
			add("regions", blocksIn(filepath.Join(s.store.Tiers.Root(t), "r")))
		} else {
			add("cold", ofSettled[t])
		}
		add("unsettled", unsettled[t])
		add("views", filesIn(filepath.Join(s.store.Tiers.Root(t), "v")))
		var metadata int64
		if st, err := os.Stat(s.store.DatabasePath(t)); err == nil {
			metadata = st.Size()
		}
		add("metadata", metadata)
	}
	return out
}

// Space tells how much room NVM has. A plan counts bytes; inodes that are scarcer count as bytes.
func Space(s *store.Store) (plan.Space, error) {
	room, err := s.Room(placement.NVM)
	return plan.Space{Free: room.Scarcer(), Total: room.Total, Reserve: room.Reserve}, err
}

// filesIn sums up the files of a directory, 0 if it cannot be read.
func filesIn(dir string) (sum int64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			sum += info.Size()
		}
	}
	return sum
}

// blocksIn sums up what the regions below a store of them (docs/regions.md) take, those that are in the making or wait in the pool
// included. A region has its blocks from the first day, a snapshot only those that are used.
func blocksIn(store string) (sum int64) {
	files, err := filepath.Glob(filepath.Join(store, "*", "*", "data"))
	if err != nil {
		return 0
	}
	for _, file := range files {
		if info, err := os.Lstat(file); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				sum += st.Blocks * 512
			}
		}
	}
	return sum
}
