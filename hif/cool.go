// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"os"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
)

// cool takes large files out of the page cache of which it is not known what a
// start touches of them: those of images that were never started, which are
// cached since the pull wrote them, and those that the last start found cached,
// once after each. Only of what is not cached can the trace of the next start
// tell which parts it touched (cachestat(2)). Files that are read from a pack
// need no such thing: the inode of the view through which a container reads them
// has a page cache of its own, which is empty before the first start, whatever is
// cached of the pack.
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
		key := [2]string{w.View, w.Digest.String()}
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
					dropCache(m.store.DataRoot() + h.Redirect)
				}
			}
			continue
		}
		for _, id := range w.Chain {
			m.coolLayer(id)
		}
	}
}

// coolLayer takes the large files of a layer that are on NVM out of the page cache.
func (m *Manager) coolLayer(id string) {
	for f, err := range m.host.OnNVM(id) {
		if err != nil {
			log.L.WithError(err).WithField("id", id).Debug("large files stay cached")
		}
		if err != nil || m.ctx.Err() != nil {
			return
		}
		if f.Bytes >= m.config.PartsFrom {
			dropCache(m.store.DataRoot() + f.Redirect)
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
