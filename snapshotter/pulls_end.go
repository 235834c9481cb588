// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"

	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// removed tells that a snapshot is gone; a pull may have been cancelled, or have
// failed. One of which a layer could not be unpacked, for want of room or another
// reason, gives back at once what it has stored: the next try would fail as well.
func (p *pulls) removed(id string) {
	p.mu.Lock()
	e := p.active[id]
	if e == nil {
		p.mu.Unlock()
		return
	}
	delete(p.active, id)
	if len(p.failed) == mostFailed {
		clear(p.failed)
	}
	p.failed[e.chainID] = true
	pl := e.pulling
	var layer store.LayerID
	if pl != nil {
		layer = pl.placed[e.index].layer
	}
	p.mu.Unlock()
	if layer != 0 {
		p.fail(pl, p.s.store.Failure(layer))
	}
}

// broke tells that the layer of an extraction could not be unpacked, which ends its pull. containerd may remove the
// snapshot much later.
func (p *pulls) broke(id string, err error) {
	p.mu.Lock()
	var pl *pulling
	if e := p.active[id]; e != nil {
		pl = e.pulling
	}
	p.mu.Unlock()
	if pl != nil {
		p.fail(pl, err)
	}
}

// fail ends a pull of which a layer could not be unpacked, unless that was cancelled.
func (p *pulls) fail(pl *pulling, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		p.finish(pl, err.Error(), p.s.store.Discard)
	}
}

// end forgets a pull and lets go of its layers: those that no snapshot uses go
// after a while.
func (p *pulls) end(pl *pulling, trouble string) { p.finish(pl, trouble, p.s.store.Release) }

// finish is end with another way to let go of layers.
func (p *pulls) finish(pl *pulling, trouble string, release func(store.LayerID)) {
	p.mu.Lock()
	if p.byKey[pl.key] != pl {
		p.mu.Unlock()
		return
	}
	delete(p.byKey, pl.key)
	close(pl.over)
	var held []store.LayerID
	for _, q := range pl.placed {
		if q.layer != 0 {
			held = append(held, q.layer)
		}
	}
	p.watch.ended(pl, trouble)
	p.mu.Unlock()
	for _, id := range held {
		release(id)
	}
	p.s.store.TrafficChanged()
	p.s.kickHot()
}
