// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"time"

	"github.com/containerd/log"
)

// run looks at the downloads whenever something has arrived, and now and then.
func (p *pulls) run(ctx context.Context) {
	defer close(p.done)
	var arrived <-chan struct{}
	if p.s.config.Downloads != nil {
		c, cancel := p.s.config.Downloads.Subscribe("")
		defer cancel()
		arrived = c
	}
	tick := time.NewTicker(p.s.config.Poll)
	defer tick.Stop()
	wasBusy := false
	for {
		p.mu.Lock()
		idle := len(p.byKey) == 0 && len(p.active) == 0
		p.mu.Unlock()
		if idle { // no timer wakes an idle daemon
			tick.Stop()
			select {
			case <-ctx.Done():
				return
			case <-p.wake:
			}
			tick.Reset(p.s.config.Poll)
		}
		select {
		case <-ctx.Done():
			return
		case <-arrived:
		case <-p.wake:
		case <-tick.C:
		}
		p.look(ctx)
		if busy := p.busy(); busy != wasBusy {
			if wasBusy = busy; !busy { // stalled
				p.s.store.TrafficChanged()
			}
		}
	}
}

// look brings all running pulls up to date and forgets those that nobody goes on with.
func (p *pulls) look(ctx context.Context) {
	p.mu.Lock()
	running := p.running()
	for id, e := range p.active {
		heard := e.since
		if e.pulling != nil {
			heard = e.pulling.touched
		}
		if !e.writing && time.Since(heard) > abandoned {
			delete(p.active, id)
		}
	}
	p.mu.Unlock()
	for _, pl := range running {
		if p.givenUp(pl) {
			p.end(pl, "no layer was stored for a while; the pull was cancelled or failed")
			continue
		}
		ask, cancel := context.WithTimeout(ctx, askTimeout)
		layers, err := p.s.config.Downloads.Progress(ask, pl.img)
		cancel()
		if err != nil {
			log.G(ctx).WithError(err).Debug("cannot see the downloads")
			continue
		}
		p.mu.Lock()
		pl.saw(layers)
		p.watch.progress(pl)
		p.mu.Unlock()
	}
}

// givenUp reports whether nothing is heard of a pull any more.
func (p *pulls) givenUp(pl *pulling) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(pl.touched) < forgotten {
		return false
	}
	for _, e := range p.active {
		if e.pulling == pl {
			return false
		}
	}
	return true
}
