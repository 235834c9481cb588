// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Watch is the observation of one start. Its methods may be called concurrently.
type Watch struct {
	t      *Tracer
	start  Start
	layers map[uint64]bool
	home   *image
	parts  *image // nil: it has none
	began  time.Time

	// Guarded by t.mu.
	opened    time.Duration // of the watch, since t.epoch
	used      time.Duration // first open; 0: none yet
	newest    time.Duration // latest first open of a file
	known     bool          // a mount of its own was seen
	executed  bool          // something of it was executed
	ready     bool          // Ready was called
	drained   bool          // and the queue was asked once more since
	overflows uint64        // t's counters when the watch was opened
	lost      uint64

	done   chan struct{}
	result Trace // set before done is closed
}

// Watch begins to observe the start of a container. It must be called before
// the container's root filesystem is mounted: the marks then stand before the
// mount can exist. A second call for a snapshot that is being watched returns
// the same watch. The parts at Start.Parts must not be replaced between this call
// and the mount of the container: opens in others are not seen. View and parts
// may be unmounted meanwhile, since the tracer holds clones of their mounts.
//
// A snapshot whose overlay is mounted already is no start: containerd asks for
// mounts again to see what a running container has changed. The error is
// [errdefs.ErrFailedPrecondition] then, and the caller goes on without a watch.
// A container that was mounted before, and is no more, starts.
func (t *Tracer) Watch(start Start) (*Watch, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("watch start of %q: tracer is closed: %w", start.Snapshot, errdefs.ErrUnavailable)
	}
	if w := t.watches[start.Snapshot]; w != nil {
		if w.used > 0 && !w.executed {
			w.newest = t.now() // it only comes now: what was seen was somebody who looked at the image
		}
		return w, nil
	}
	if mounted, err := t.mounted(start.Upper); err != nil || mounted {
		if err == nil {
			err = fmt.Errorf("it is mounted already: %w", errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("watch start of %q: %w", start.Snapshot, err)
	}
	w := &Watch{
		t: t, start: start, began: time.Now(), opened: t.now(),
		overflows: t.stats.Overflows, lost: t.stats.Lost,
		done: make(chan struct{}),
	}
	if err := w.mark(); err != nil {
		return nil, fmt.Errorf("watch start of %q: %w", start.Snapshot, err)
	}
	// A mount that no watch had a claim to may be of this start.
	t.forgetForeign()
	t.watches[start.Snapshot] = w
	t.stats.Watches++
	t.wake()
	return w, nil
}

// mark begins to watch the filesystems that the start will read from. The caller
// holds t.mu.
func (w *Watch) mark() (err error) {
	t := w.t
	if w.layers, err = layersOf(w.start.Layers); err != nil {
		return err
	}
	if w.home, err = t.watchImage(w.start.Home, false); err != nil {
		return err
	}
	if w.parts, err = t.watchImage(w.start.Parts, true); err == nil && len(t.watches) == 0 {
		err = t.mark(true)
	}
	if err != nil {
		for _, im := range []*image{w.home, w.parts} {
			t.unwatchImage(im)
			t.dropImage(im)
		}
	}
	return err
}

func layersOf(ids []string) (map[uint64]bool, error) {
	layers := make(map[uint64]bool, len(ids))
	for _, id := range ids {
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("layer id %q is no number: %w", id, errdefs.ErrInvalidArgument)
		}
		layers[n] = true
	}
	return layers, nil
}

// mounted tells whether an overlay with the upper directory stands in our mount
// table. The caller holds t.mu.
func (t *Tracer) mounted(upper string) (bool, error) {
	if upper == "" {
		return false, nil // views share nothing but the tree
	}
	visible, err := t.own.overlays()
	return slices.ContainsFunc(visible, func(o *overlay) bool { return o.upper == upper }), err
}

// Find returns the open watch of a snapshot, or nil.
func (t *Tracer) Find(snapshot string) *Watch {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.watches[snapshot]
}

// Ready says that the container has started. What it opened until now is
// recorded and the watch ends.
func (w *Watch) Ready() {
	w.t.mu.Lock()
	defer w.t.mu.Unlock()
	w.ready = true
	w.t.wake()
}

// Done is closed when the watch has ended and its result is there.
func (w *Watch) Done() <-chan struct{} { return w.done }

// Result waits for the end of the watch.
func (w *Watch) Result() Trace {
	<-w.done
	return w.result
}

// Files is how many files the start has opened so far, those left out whose
// mount is not tied to a container yet.
func (w *Watch) Files() (n int) {
	// mu alone: whoever ties mounts to containers may wait for somebody's filesystem.
	w.t.mu.Lock()
	defer w.t.mu.Unlock()
	for _, c := range w.t.mounts {
		if slices.Contains(c.owners, w) {
			n += len(c.entries)
		}
	}
	return n
}

func (w *Watch) touch(now time.Duration) {
	if w.used == 0 {
		w.used = now
	}
	w.newest = now
}

// patience is how many quiet periods a watch lasts in which nothing was executed.
const patience = 4

// due says when the watch ends if nothing more happens, and why.
func (w *Watch) due() (time.Duration, Reason) {
	if w.used == 0 {
		return w.opened + w.t.cfg.Unused, EndUnused
	}
	quiet := w.t.cfg.Quiet
	if !w.executed {
		// containerd reads /etc/passwd of an image, and then sets up namespaces and
		// cgroups: on a host that starts many at once that takes its time.
		quiet *= patience
	}
	if q, m := w.newest+quiet, w.used+w.t.cfg.Max; q < m {
		return q, EndQuiet
	} else {
		return m, EndMax
	}
}

// tick ends the watches that are due and sets the deadline of the next wait.
// drained: the queue was just found empty, so nothing that happened before is
// missing. It returns again if the queue must be asked once more, and done when
// the tracer is closed and the last watch ended.
func (t *Tracer) tick(drained bool) (again, done bool) {
	t.resolving.Lock()
	defer t.resolving.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	next := time.Duration(-1)
	for _, w := range t.watches {
		due, why := w.due()
		switch {
		case t.closed:
			t.finish(w, EndClosed)
		case w.ready && drained && w.drained:
			t.finish(w, EndReady)
		case w.ready && drained:
			// Events of before Ready may have come since the queue was empty.
			w.drained, again = true, true
		case now >= due && (drained || why == EndMax):
			t.finish(w, why)
		case next < 0 || due < next:
			next = due
		}
	}
	if t.closed {
		return false, true
	}
	var deadline time.Time
	if next >= 0 {
		deadline = t.epoch.Add(next)
	}
	if err := t.file.SetReadDeadline(deadline); err != nil {
		log.L.WithError(err).Error("the end of a cold start cannot be awaited")
	}
	return again, false
}

// finish takes a watch out and has its result measured. The caller holds
// t.resolving and t.mu.
func (t *Tracer) finish(w *Watch, why Reason) {
	delete(t.watches, w.start.Snapshot)
	found := map[pack.Ref]*File{}
	var order []*File
	add := func(e *entry, assumed bool) {
		if f := found[e.ref]; f != nil {
			if !assumed {
				f.merge(e, w.opened)
			}
			return
		}
		f := e.file(w.opened)
		f.Assumed = assumed
		found[e.ref] = f
		order = append(order, f)
	}
	var orphans []*clone
	mine := map[*clone]bool{}
	ran := false // something was executed through a mount that is known to be its own
	for _, c := range t.mounts {
		ran = ran || c.ran && slices.Contains(c.owners, w)
	}
	for _, c := range t.mounts {
		i := slices.Index(c.owners, w)
		if i < 0 {
			if len(c.owners) == 0 && !c.foreign && t.fits(c, w) {
				orphans = append(orphans, c)
				// Not so what a container executed that nobody watches: such a start has had its mount.
				mine[c] = !(ran && c.ran) && t.fitsAlone(c, w)
				c.fitted = true
			}
			continue
		}
		mine[c] = true
		for _, e := range c.entries {
			add(e, false)
		}
		if c.owners = slices.Delete(c.owners, i, i+1); len(c.owners) == 0 {
			t.drop(c)
			c.foreign = true
		}
	}
	for _, c := range orphans {
		if !mine[c] && !t.mayBeOf(c, mine) {
			continue
		}
		for _, e := range c.entries {
			if e.first >= w.opened {
				add(e, true)
			}
		}
	}
	if len(t.watches) == 0 {
		if err := t.mark(false); err != nil {
			log.L.WithError(err).Warn("the marks of the tracer could not be removed")
		}
		for _, c := range t.mounts {
			if len(c.owners) == 0 && !c.foreign && len(c.entries) > 0 {
				t.stats.Unresolved++
			}
		}
		clear(t.mounts)
		t.files = 0
	}
	slices.SortFunc(order, func(a, b *File) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Number, b.Number))
	})
	w.result = Trace{
		Snapshot: w.start.Snapshot, Began: w.began, Duration: t.now() - w.opened,
		Files:     make([]File, len(order)),
		Overflows: t.stats.Overflows - w.overflows, Lost: t.stats.Lost - w.lost,
		Ended: why,
	}
	for i, f := range order {
		w.result.Files[i] = *f
	}
	w.result.Complete = w.result.Overflows == 0 && w.result.Lost == 0 && why != EndClosed
	t.unwatchImage(w.home)
	t.unwatchImage(w.parts)
	t.wg.Go(func() {
		w.measure(w.result.Files)
		t.mu.Lock()
		t.dropImage(w.home)
		t.dropImage(w.parts)
		t.mu.Unlock()
		close(w.done)
	})
}

// file makes the record of an entry; what can be measured later is added by
// [Watch.measure]. Touched carries what was cached at first sight until then.
func (e *entry) file(opened time.Duration) *File {
	f := &File{Ref: e.ref, Kind: Read, First: max(e.first-opened, 0), Opens: e.opens, Size: e.size,
		Tier: e.tier(), Parts: e.slot() == partsSlot, Touched: e.warm, evicted: e.evicted, image: e.image}
	if e.exec {
		f.Kind = Exec
	}
	return f
}

// merge adds what was opened of the same file through another clone: it moved
// to the other tier during the start, or two mounts serve the start.
func (f *File) merge(e *entry, opened time.Duration) {
	g := e.file(opened)
	moved := f.image != g.image
	f.Opens += g.Opens
	f.Assumed = false
	if g.Kind == Exec {
		f.Kind = Exec
	}
	if g.First < f.First {
		f.First, f.Tier, f.Parts, f.image = g.First, g.Tier, g.Parts, g.image
	}
	if f.Touched < 0 || g.Touched < 0 || moved {
		f.Touched = -1 // what the cache of one copy holds is not all
	} else {
		f.Touched, f.evicted = min(f.Touched, g.Touched), min(f.evicted, g.evicted)
	}
}
