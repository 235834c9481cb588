// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// space tells what takes the space of each tier, from the database and without
// looking into layers. What is hot is as of the last plan.
func (s backend) space(ctx context.Context) (out [2][]*control.Space, err error) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return out, err
	}
	settled, hot, pinned := map[string]bool{}, int64(0), int64(0)
	if s.hot != nil {
		o := s.hot.Overview()
		settled, hot = o.SettledLayers, o.HotOnNVM
		if engine := s.hot.Engine(); engine != nil {
			pinned = engine.Progress().Pinned
		}
	}
	var ofSettled, unsettled [2]int64
	for _, sn := range all {
		if sn.Info.Kind != snapshots.KindCommitted {
			continue
		}
		into := &unsettled
		if settled[sn.ID] {
			into = &ofSettled
		}
		nvm, hdd := sn.bytes()
		into[placement.NVM] += nvm
		into[placement.HDD] += hdd
	}
	for _, t := range tier.Tiers {
		add := func(kind string, bytes int64) {
			out[t] = append(out[t], &control.Space{Kind: kind, Bytes: bytes})
		}
		database := s.db.path
		if t == placement.NVM {
			hot = min(hot, ofSettled[t])
			add("hot", hot)
			add("parts", filesIn(filepath.Join(s.tiers.Root(t), "p")))
			add("cold", ofSettled[t]-hot)
			add("pinned", pinned)
			add("regions", blocksIn(filepath.Join(s.tiers.Root(t), "r")))
		} else {
			add("cold", ofSettled[t])
			database = s.path(databaseFile)
		}
		add("unsettled", unsettled[t])
		add("trees", filesIn(filepath.Join(s.tiers.Root(t), "t")))
		metadata := filesIn(filepath.Join(s.tiers.Root(t), "m"))
		if st, err := os.Stat(database); err == nil {
			metadata += st.Size()
		}
		add("metadata", metadata)
	}
	return out, nil
}

// PromisedNVM tells how many bytes of NVM are promised to layers that are being stored, or will be at once. Some of them may be there already.
func (s *Snapshotter) PromisedNVM() (sum int64) {
	p := s.placer
	p.mu.Lock()
	defer p.mu.Unlock()
	add := func(e *extract) {
		if e.tier() == placement.NVM {
			sum += placement.Footprint(e.decision.Input.Layers[e.decision.Input.Index].Size())
		}
	}
	for _, e := range p.active {
		add(e)
	}
	for e := range p.planned {
		add(e)
	}
	return sum
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
