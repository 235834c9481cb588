// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
)

// cool takes the large files of images that were never started out of the page
// cache, once for each image. They are there since the pull wrote them; only of
// what is not can the trace of the first start tell which parts it touched
// (cachestat(2)). Files on HDD are left: reading them again would take long.
func (m *Manager) cool(images []wanted, layers []plan.Layer) {
	if m.config.PartsFrom <= 0 || m.tracer == nil || m.Busy() {
		return
	}
	fixed := map[string]bool{}
	for _, l := range layers {
		fixed[l.ID] = l.Fixed != "" // dirty pages stay cached
	}
next:
	for _, w := range images {
		if m.cooled[w.Top()] || w.settled() {
			continue
		}
		for _, id := range w.Chain {
			if fixed[id] {
				continue next
			}
		}
		m.cooled[w.Top()] = true
		err := m.store.Files(m.ctx, w.Image, func(f File) bool {
			if f.Size >= m.config.PartsFrom {
				dropCache(filepath.Join(m.tiers.DataRoot(placement.NVM), f.Redirect))
			}
			return m.ctx.Err() == nil
		})
		if err != nil {
			log.L.WithError(err).WithField("image", w.name()).Debug("large files stay cached")
		}
	}
}

// dropCache takes a file out of the page cache, but for pages that are mapped or dirty.
func dropCache(path string) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return // it stands elsewhere
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // a hint
}
