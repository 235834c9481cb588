// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
)

// cool takes large files out of the page cache of which it is not known what a
// start touches of them: those of images that were never started, which are
// cached since the pull wrote them, and those that the last start found cached,
// once after each. Only of what is not cached can the trace of the next start
// tell which parts it touched (cachestat(2)). Files on HDD are left: reading them
// again would take long.
func (m *Manager) cool(images []wanted, layers []plan.Layer) {
	if m.config.PartsFrom <= 0 || m.tracer == nil || m.Busy() {
		return
	}
	fixed := map[string]bool{}
	for _, l := range layers {
		fixed[l.ID] = l.Fixed != "" // dirty pages stay cached
	}
	before := m.cooled
	m.cooled = make(map[[2]string]time.Time, len(images)) // those that are gone are forgotten
next:
	for _, w := range images {
		key := [2]string{w.Top(), w.Digest.String()}
		if at, done := before[key]; done && at.Equal(w.Updated) {
			m.cooled[key] = at
			continue
		}
		for _, id := range w.Chain {
			if fixed[id] {
				continue next
			}
		}
		m.cooled[key] = w.Updated
		if w.settled() {
			for _, h := range w.Hot {
				if h.Touched < 0 && !h.Pinned && h.Size >= m.config.PartsFrom {
					dropCache(filepath.Join(m.tiers.DataRoot(placement.NVM), w.redirect(h.Layer, h.Path)))
				}
			}
			continue
		}
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
