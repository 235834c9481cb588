// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Start is a container that is about to start.
type Start struct {
	trace.Start        // Path is the manager's to set
	Namespace   string //
	Key         string // of the snapshot, as its client named it
	View        string // that it was made on, see [Image]
}

// openStart is a start that is being watched.
type openStart struct {
	Start
	watch *trace.Watch
	began time.Time
	// missing says that the tracer asked for a file of which it is not known where
	// containers see it; files, once read, knows all of them.
	missing chan struct{}
	files   atomic.Pointer[Listing]
	// recorded is closed when the start is in the profile, or was none.
	recorded chan struct{}
	// Guarded by Manager.mu; "" while not known.
	image digest.Digest
	name  string
	// guessed: containerd was not asked. What was known of images when the start
	// began may lack one that was pulled since and has the same layers.
	guessed bool
}

// askAgain are the moments after the beginning of a watch at which containerd
// is asked which container it is: its record is
// made between the first call for the snapshot's mounts and the start of its
// task, and goes with it.
var askAgain = []time.Duration{50 * time.Millisecond, 250 * time.Millisecond, time.Second, 4 * time.Second}

// Mounted has a start traced. It is called with every answer to a request for
// mounts, before the answer is given; what it costs then is setting two marks.
// Without a tracer it does nothing.
func (m *Manager) Mounted(start Start) {
	if m.tracer == nil {
		return
	}
	o := &openStart{Start: start, began: time.Now(), missing: make(chan struct{}, 1), recorded: make(chan struct{})}
	o.Path = func(ref pack.Ref) string { return m.shown(o, ref) }
	w, err := m.tracer.Watch(o.Start.Start)
	if err != nil {
		if !errdefs.IsFailedPrecondition(err) { // it runs already: no start
			log.L.WithError(err).WithField("snapshot", start.Key).Warn("a start is not traced")
		}
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.starts[start.Snapshot] != nil {
		return
	}
	o.watch = w
	image, known := m.guess(o)
	m.starts[start.Snapshot] = o
	// With the lock: else the end of another start of the chain might undo it.
	m.store.StartBegins(m.ctx, o.View, o.Layers)
	if known {
		m.readAhead(image)
	}
	m.wg.Go(func() { m.follow(o) })
	m.wg.Go(func() { m.listFor(o) })
}

// shown is where the container of a start sees a data file. It answers at once;
// where it does not know, it has the image listed.
func (m *Manager) shown(o *openStart, ref pack.Ref) string {
	if files := o.files.Load(); files != nil {
		file, _ := files.find(ref)
		return file.shown
	}
	if path := m.library.shown(o.View, ref); path != "" {
		return path
	}
	select {
	case o.missing <- struct{}{}:
	default: // it is being listed, or about to be
	}
	return ""
}

// listFor lists the image of a start when the tracer misses a file.
func (m *Manager) listFor(o *openStart) {
	select {
	case <-o.watch.Done():
		return
	case <-o.missing:
	}
	// It need not be an image that is known: a build starts containers of its own layers.
	files, err := m.library.listing(m.ctx, Image{Namespace: o.Namespace, View: o.View, Chain: o.Layers})
	if err != nil {
		if m.ctx.Err() == nil {
			log.L.WithError(err).WithField("snapshot", o.Key).Warn("it may not be found out which files a start opens")
		}
		return
	}
	o.files.Store(files)
	m.tracer.Retry()
}

// guess supposes the image of a start where only one has its chain, for what
// cannot wait. Called with mu held.
func (m *Manager) guess(o *openStart) (Image, bool) {
	of := func(i Image) bool { return i.Namespace == o.Namespace && i.View == o.View }
	first := slices.IndexFunc(m.images, of)
	if first < 0 || slices.ContainsFunc(m.images[first+1:], of) {
		return Image{}, false
	}
	image := m.images[first]
	o.image, o.name, o.guessed = image.Digest, image.name(), true
	return image, true
}

// follow waits for the end of a start and records it.
func (m *Manager) follow(o *openStart) {
	for _, after := range askAgain {
		select {
		case <-o.watch.Done():
		case <-time.After(time.Until(o.began.Add(after))):
			if m.identify(o) != "" {
				break
			}
			continue
		}
		break
	}
	result := o.watch.Result()
	m.identify(o)
	defer func() {
		m.mu.Lock()
		delete(m.starts, o.Snapshot)
		last := !m.starting(o.View)
		if last {
			m.store.StartsEnded(m.ctx, o.View)
		}
		m.mu.Unlock()
		if last {
			// What the starts used is cached a second time, with the files.
			parts.Forget(m.store.PartsPath(o.View))
		}
		close(o.recorded)
		m.Kick() // the engine may have waited for its end
	}()
	if err := m.record(m.ctx, o, result); err != nil && m.ctx.Err() == nil {
		log.L.WithError(err).WithField("snapshot", o.Key).Warn("a start was not recorded")
	}
}

// starting tells whether a start of a chain is watched. Called with mu held.
func (m *Manager) starting(view string) bool {
	for _, o := range m.starts {
		if o.View == view {
			return true
		}
	}
	return false
}

// identify asks containerd for the image of a start, unless it is known.
func (m *Manager) identify(o *openStart) digest.Digest {
	m.mu.Lock()
	image, guessed := o.image, o.guessed
	m.mu.Unlock()
	if image != "" && !guessed {
		return image
	}
	image, name, err := m.store.ImageOf(m.ctx, o.Namespace, o.Key)
	if err != nil {
		return ""
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	o.image, o.name, o.guessed = image, name, false
	return image
}

// record adds a start to the profile of its image.
func (m *Manager) record(ctx context.Context, o *openStart, tr trace.Trace) error {
	fields := log.Fields{
		"namespace": o.Namespace, "snapshot": o.Key, "files": len(tr.Files), "ended": string(tr.Ended), "complete": tr.Complete, "took": tr.Duration,
	}
	if !tr.Executed() || tr.Ended == trace.EndClosed {
		log.G(ctx).WithFields(fields).Debug("no start: nothing was executed")
		return nil
	}
	m.leaveHot(o, tr.Files)
	images, err := m.candidates(ctx, o)
	if err != nil {
		return err
	}
	if len(images) == 0 {
		log.G(ctx).WithFields(fields).Debug("a start of no image that is known")
		return nil
	}
	refs := make([]pack.Ref, len(tr.Files))
	for i, f := range tr.Files {
		refs[i] = f.Ref
	}
	for _, image := range images {
		known, err := m.library.find(ctx, image, refs)
		if err != nil {
			return fmt.Errorf("record start of image %s: %w", image.Digest, err)
		}
		start, foreign := profile.FromTrace(tr, func(ref pack.Ref) (profile.Entry, bool) {
			file, ok := known[ref]
			return file.Entry, ok
		})
		files := m.library.lazy(ctx, image)
		p, err := m.book.Record(image.Image, start, files)
		if err = errors.Join(err, files.err); err != nil {
			return fmt.Errorf("record start of image %s: %w", image.Digest, err)
		}
		m.forgetPrediction(image.Digest)
		if err := m.setOrigin(image.Digest, Nothing); err != nil {
			return err
		}
		log.G(ctx).WithFields(fields).WithField("image", image.Name).WithField("starts", p.Starts).WithField("foreign", foreign).Info("start recorded")
	}
	m.Kick() // before the start is counted: who sees the count shall see that there is something to do
	m.counters.recorded.Add(1)
	if !tr.Complete {
		m.counters.incomplete.Add(1)
	}
	return nil
}

// candidates are the images that a start may be of: the one that its container
// names, else all that have its chain.
func (m *Manager) candidates(ctx context.Context, o *openStart) ([]Image, error) {
	images, err := m.store.Images(ctx)
	if err != nil {
		return nil, err
	}
	images = slices.DeleteFunc(images, func(i Image) bool {
		return i.Namespace != o.Namespace || i.View != o.View
	})
	m.mu.Lock()
	named := o.image
	if o.guessed {
		named = ""
	}
	m.mu.Unlock()
	if i := slices.IndexFunc(images, func(i Image) bool { return i.Digest == named }); i >= 0 {
		return images[i : i+1], nil
	}
	return images, nil
}

// Ready ends the watch of a start and waits until it is recorded: what was
// opened until now is what it needed. The error is ErrNotFound if no start of
// that snapshot is being watched.
func (m *Manager) Ready(ctx context.Context, namespace, snapshot string) (OpenStart, error) {
	m.mu.Lock()
	var found *openStart
	for _, o := range m.starts {
		if o.Namespace == namespace && o.Key == snapshot {
			found = o
		}
	}
	m.mu.Unlock()
	if found == nil {
		return OpenStart{}, fmt.Errorf("no start of container %q in namespace %q is being watched; it is over, or there is no such container: %w",
			snapshot, namespace, errdefs.ErrNotFound)
	}
	found.watch.Ready()
	select {
	case <-found.recorded:
	case <-ctx.Done():
		return OpenStart{}, ctx.Err()
	}
	return m.describe(found), nil
}

// OpenStart is a start that is being watched, for people.
type OpenStart struct {
	Namespace, Snapshot string
	Image               string // reference or digest; "" if not known
	Began               time.Time
	Files               int // opened so far
}

// Starts lists the starts that are being watched, the oldest first.
func (m *Manager) Starts() []OpenStart {
	m.mu.Lock()
	open := make([]*openStart, 0, len(m.starts))
	for _, o := range m.starts {
		open = append(open, o)
	}
	m.mu.Unlock()
	all := make([]OpenStart, 0, len(open))
	for _, o := range open {
		all = append(all, m.describe(o))
	}
	slices.SortFunc(all, func(a, b OpenStart) int { return a.Began.Compare(b.Began) })
	return all
}

func (m *Manager) describe(o *openStart) OpenStart {
	files := o.watch.Files()
	m.mu.Lock()
	defer m.mu.Unlock()
	return OpenStart{o.Namespace, o.Key, o.name, o.began, files}
}
