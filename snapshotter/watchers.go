// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// watchers hands what happens to pulls to who wants to know. A watcher that
// does not keep up loses the oldest events, never holds up a pull.
type watchers struct {
	mu     sync.Mutex
	subs   map[chan *control.Event]bool
	closed bool
}

const watcherBacklog = 256

// subscribe returns a channel of events, closed when the daemon stops. The
// first ones are given, in order, before any that happens later.
func (w *watchers) subscribe(first []*control.Event) (<-chan *control.Event, func()) {
	c := make(chan *control.Event, watcherBacklog+len(first))
	for _, e := range first {
		c <- e
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		close(c)
		return c, func() {}
	}
	if w.subs == nil {
		w.subs = map[chan *control.Event]bool{}
	}
	w.subs[c] = true
	return c, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.subs, c)
	}
}

func (w *watchers) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for c := range w.subs {
		close(c)
	}
	w.subs = nil
}

func (w *watchers) publish(e *control.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.subs {
		select {
		case c <- e:
			continue
		default:
		}
		select {
		case <-c:
		default:
		}
		select {
		case c <- e:
		default:
		}
	}
}

func (w *watchers) wanted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.subs) > 0
}

func event(pl *pulling, kind string) *control.Event {
	return &control.Event{
		Time: timestamppb.New(time.Now()), Type: kind, Pull: pl.key, Namespace: pl.img.Namespace, Image: pl.img.Name,
	}
}

// whole is the state of all layers of a pull.
func whole(pl *pulling) *control.Event {
	e := event(pl, "pull")
	for i := range pl.placed {
		e.Layers = append(e.Layers, layerProgress(pl, i))
	}
	return e
}

func (w *watchers) began(pl *pulling) { w.publish(whole(pl)) }

// progress sends the layers that have changed since the last time.
func (w *watchers) progress(pl *pulling) {
	if !w.wanted() {
		return
	}
	e := event(pl, "progress")
	if pl.shown == nil {
		pl.shown = make([]shown, len(pl.placed))
	}
	for i := range pl.placed {
		l := layerProgress(pl, i)
		if now := (shown{l.Offset, l.State, l.Tier}); now != pl.shown[i] {
			pl.shown[i] = now
			e.Layers = append(e.Layers, l)
		}
	}
	if len(e.Layers) > 0 {
		w.publish(e)
	}
}

type shown struct {
	offset      int64
	state, tier string
}

func (w *watchers) stored(pl *pulling, i int) {
	e := event(pl, "progress")
	e.Layers = []*control.LayerProgress{layerProgress(pl, i)}
	w.publish(e)
}

// decided sends the decision on a layer: before its first file is placed, or
// after the last where the policy places files one by one.
func (w *watchers) decided(pl *pulling, i int, d *control.Decision) {
	e := event(pl, "decision")
	l := layerProgress(pl, i)
	l.Tier, l.Decision = d.Tier, d
	e.Layers, e.Message = []*control.LayerProgress{l}, d.Reason
	w.publish(e)
}

func (w *watchers) ended(pl *pulling, trouble string) {
	e := event(pl, "done")
	if trouble != "" {
		e.Type, e.Message = "failed", trouble
	}
	w.publish(e)
}

func layerProgress(pl *pulling, i int) *control.LayerProgress {
	l, q := pl.layers[i], pl.placed[i]
	p := &control.LayerProgress{Index: int32(i), Digest: l.Digest, Size: l.Compressed, Offset: l.Offset}
	if q.storing || q.stored && q.job != nil {
		p.Tier = q.tier.String()
	}
	switch {
	case q.stored:
		p.State = "stored"
	case q.storing:
		p.State = "storing"
	case !l.Downloaded && l.Offset == 0:
		p.State = "waiting"
	case !l.Downloaded:
		p.State = "downloading"
	case l.Arrived.IsZero():
		p.State = "present"
	default:
		p.State = "downloaded"
	}
	return p
}

// running is all pulls in the order in which they began. Called with p.mu held.
func (p *pulls) running() []*pulling {
	pulls := make([]*pulling, 0, len(p.byKey))
	for _, pl := range p.byKey {
		pulls = append(pulls, pl)
	}
	slices.SortFunc(pulls, func(a, b *pulling) int { return a.began.Compare(b.began) })
	return pulls
}

// Subscribe returns a channel of events, which begins with the pulls that are
// running, and a function that ends it.
func (p *pulls) Subscribe() (<-chan *control.Event, func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first []*control.Event
	for _, pl := range p.running() {
		first = append(first, whole(pl))
	}
	return p.watch.subscribe(first)
}
