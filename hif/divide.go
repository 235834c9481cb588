// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
)

// division is the files of one chain of layers of which only parts belong on
// NVM. Images with the same chain share it.
type division struct {
	view    string
	set     parts.Set
	path    string          // of the image
	have    map[string]bool // redirects that the image on NVM serves already
	current bool            // it serves all of the set
	used    time.Time
	home    bool // all layers of the files have their home on HDD
	touched map[string][]parts.Range
}

// divisions decides for which chains parts are kept, by the images that are settled.
func (m *Manager) divisions(images []wanted, home map[string]bool) map[string]*division {
	all := map[string]*division{}
	wants := map[string][]parts.Want{}
	bytes := map[string]int64{} // of the images
	for _, w := range images {
		path := m.store.PartsPath(w.View)
		if path == "" {
			continue
		}
		d := all[w.View]
		if d == nil {
			d = &division{view: w.View, path: path, home: true}
			all[w.View] = d
		}
		if w.used().After(d.used) {
			d.used = w.used()
		}
		if m.config.PartsFrom <= 0 || !w.settled() {
			continue // what stands for it from before goes
		}
		for _, h := range w.Hot {
			if !m.divides(h.Hot) {
				continue
			}
			wants[d.view] = append(wants[d.view], want(h.Redirect, h.Size, h.Ranges))
		}
		if len(wants[d.view]) > 0 && bytes[d.view] == 0 {
			bytes[d.view] = m.bytesOf(w.Image)
		}
	}
	m.sizes = bytes
	for view, d := range all {
		m.mu.Lock()
		u := m.undivided[view]
		m.mu.Unlock()
		if !u.failed || time.Since(u.at) > partsRetry { // else the files are hot as a whole
			all := merge(wants[view])
			d.set = parts.Choose(all, parts.Rules{MinSize: m.config.PartsFrom, Spare: int64(marginShare * float64(bytes[view]))})
			d.touched = make(map[string][]parts.Range, len(all))
			for _, w := range all {
				d.touched[w.Redirect] = w.Ranges
			}
		}
		d.have, d.current = m.served(d)
		if len(d.set.Files) == 0 && d.current {
			delete(all, view) // none are wanted, and none are there
		}
		for _, f := range d.set.Files {
			d.home = d.home && home[layerOf(f.Redirect)]
		}
	}
	return all
}

// divides reports whether of a hot file of a settled image only parts may belong on NVM. A pinned file stays whole: that is what the
// operator asked for.
func (m *Manager) divides(h profile.Hot) bool {
	return m.config.PartsFrom > 0 && h.Touched >= 0 && !h.Pinned && h.Size >= m.config.PartsFrom && len(h.Ranges) > 0
}

// marginShare is how much of an image's bytes the margins around what starts
// touch may cost. Of a large image, whose starts differ most, that is plenty.
const marginShare = 0.03

// bytesOf is the size of an image's files, 0 if they cannot be listed. It never
// changes.
func (m *Manager) bytesOf(image Image) int64 {
	if n := m.sizes[image.View]; n > 0 {
		return n
	}
	files, err := m.library.listing(m.ctx, image)
	if err != nil {
		log.L.WithError(err).WithField("image", image.name()).Debug("parts of its files have no margin")
		return 0
	}
	return files.bytes
}

// merge joins what several images of one chain want of a file.
func merge(wants []parts.Want) (out []parts.Want) {
	at := map[string]int{}
	for _, w := range wants {
		if i, ok := at[w.Redirect]; ok {
			out[i].Ranges = append(out[i].Ranges, w.Ranges...)
			continue
		}
		at[w.Redirect] = len(out)
		out = append(out, w)
	}
	return out
}

// served tells which of the files the image on NVM serves with all the parts
// that were touched, and whether it need not be made anew: it serves all, and
// nothing else. The margins around what was touched are for what the next start
// may touch; that it touched some of them is no reason to make parts again.
func (m *Manager) served(d *division) (have map[string]bool, current bool) {
	have = map[string]bool{}
	stands, err := parts.Read(d.path)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			log.L.WithError(err).Warn("the parts of an image are unusable and are made again")
		}
		return have, len(d.set.Files) == 0
	}
	byName := map[string]parts.File{}
	for _, f := range stands.Files {
		byName[f.Redirect] = f
	}
	current = len(stands.Files) == len(d.set.Files)
	for _, f := range d.set.Files {
		if s, ok := byName[f.Redirect]; ok && s.Size == f.Size && len(s.Cold(parts.Hot(f.Size, d.touched[f.Redirect], 0))) == 0 {
			have[f.Redirect] = true
		}
	}
	return have, current && len(have) == len(d.set.Files)
}

// leaveHot takes from the ranges of files of which parts are on NVM what is hot
// already. It is known, and the kernel has read around what was touched: taken
// for touched, too, that would let the parts grow from start to start.
func (m *Manager) leaveHot(o *openStart, files []trace.File) {
	if !slices.ContainsFunc(files, func(f trace.File) bool { return f.Parts }) {
		return
	}
	set, err := parts.Read(m.store.PartsPath(o.View))
	if err != nil {
		return // replaced or gone: all counts as touched
	}
	hot := make(map[string]parts.File, len(set.Files))
	for _, f := range set.Files {
		hot[f.Redirect] = f
	}
	for i := range files {
		f := &files[i]
		h, ok := hot[f.Redirect()]
		if !f.Parts || !ok || h.Size != f.Size {
			continue
		}
		ranges := make([]parts.Range, 0, len(f.Ranges))
		for _, r := range f.Ranges {
			ranges = append(ranges, parts.Range(r))
		}
		f.Ranges = nil
		for _, r := range h.Cold(ranges) {
			f.Ranges = append(f.Ranges, trace.Range(r))
		}
	}
}

// divide makes the images of parts that are wanted and not there, one after
// the other. It runs beside the loop, at most once at a time.
func (m *Manager) divide(todo []*division, floor int64) {
	limit := rate.NewLimiter(rate.Inf, 0)
	if r := m.config.Engine.Rate; r > 0 {
		limit = rate.NewLimiter(rate.Limit(r), 1<<20)
	}
	for _, d := range todo {
		if m.ctx.Err() != nil {
			return
		}
		if err := m.divideOne(d, floor, limit); err != nil && m.ctx.Err() == nil {
			log.L.WithError(err).WithField("id", d.view).Warn("parts of large files could not be kept; the files stay whole")
			m.mu.Lock()
			m.undivided[d.view] = undivided{time.Now(), true}
			m.mu.Unlock()
		}
	}
}

// partsRetry is when the parts of an image are tried again after an error.
const partsRetry = 10 * time.Minute

func (m *Manager) divideOne(d *division, floor int64, limit *rate.Limiter) error {
	if len(d.set.Files) == 0 {
		if err := os.Remove(d.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return m.store.PartsChanged(m.ctx, d.view)
	}
	need := int64(0)
	for _, f := range d.set.Files {
		need += f.Bytes()
	}
	free, err := m.host.Free()
	if err != nil {
		return err
	}
	if free-need < floor {
		return fmt.Errorf("parts of %d bytes find no room on NVM: %w", need, errdefs.ErrResourceExhausted)
	}
	stats, err := parts.Write(m.ctx, d.path, m.store.DataRoot(), m.store, d.set, func(n int) error { return m.pace(n, limit) })
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return err
	}
	// Not between the mounts that a start was promised and its own: what comes
	// through parts that it was not promised is not traced.
	if err := m.pace(0, limit); err != nil {
		return err
	}
	log.L.WithFields(log.Fields{"id": d.view, "files": len(d.set.Files), "bytes": stats.Bytes, "whole": stats.Whole, "margin": d.set.Margin}).Info("parts of large files are on NVM")
	return m.store.PartsChanged(m.ctx, d.view)
}

// pace waits before a piece of n bytes is moved.
func (m *Manager) pace(n int, limit *rate.Limiter) error {
	for {
		m.mu.Lock()
		hurry := m.hurry
		m.mu.Unlock()
		if hurry {
			return m.ctx.Err()
		}
		if _, busy := m.host.Busy(); !busy {
			return limit.WaitN(m.ctx, n)
		}
		select {
		case <-m.ctx.Done():
			return m.ctx.Err()
		case <-time.After(yield):
		}
	}
}

// yield is how long work waits before it looks again whether a start or pull is over.
const yield = 500 * time.Millisecond
