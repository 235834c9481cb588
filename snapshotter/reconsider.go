// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/placement/tier"
)

// run looks at the downloads whenever something has arrived, and now and then.
func (p *placer) run(ctx context.Context) {
	defer close(p.done)
	var arrived <-chan struct{}
	if p.s.config.Downloads != nil {
		c, cancel := p.s.config.Downloads.Subscribe("")
		defer cancel()
		arrived = c
	}
	tick := time.NewTicker(p.s.config.Poll)
	defer tick.Stop()
	for {
		p.mu.Lock()
		idle := len(p.pulls) == 0 && len(p.active) == 0
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
		p.lookAt(ctx)
	}
}

// lookAt brings all running pulls up to date.
func (p *placer) lookAt(ctx context.Context) {
	p.mu.Lock()
	pulls := p.running()
	p.mu.Unlock()
	for _, pl := range pulls {
		if p.giveUp(pl) {
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
		for _, e := range p.active {
			if e.pulling == pl && !e.bound {
				p.reconsider(ctx, e)
			}
		}
		p.mu.Unlock()
	}
	p.save(ctx)
	p.expire(ctx)
}

// save writes down the decisions that have become final.
func (p *placer) save(ctx context.Context) {
	p.mu.Lock()
	texts := map[string]json.RawMessage{}
	for id, e := range p.active {
		if e.bound && e.unsaved {
			texts[id], e.unsaved = e.text(), false
		}
	}
	p.mu.Unlock()
	for id, text := range texts {
		if err := p.s.db.updateRecord(ctx, id, func(r *record) { r.Decision = text }); err != nil {
			log.G(ctx).WithError(err).Warn("cannot record a decision")
		}
	}
}

// expire forgets extractions that nobody goes on with: containerd was killed,
// or a pull was cancelled and its snapshot waits for garbage collection.
func (p *placer) expire(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, e := range p.active {
		idle := time.Since(e.since) > storedLong
		if !e.bound {
			idle = time.Since(e.pulling.touched) > abandoned
		}
		if idle {
			log.G(ctx).WithField("id", id).Info("nothing was heard of an extraction for long; it no longer holds up background work")
			delete(p.active, id)
		}
	}
}

// giveUp forgets a pull of which nothing is heard any more.
func (p *placer) giveUp(pl *pulling) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.active {
		if e.pulling == pl {
			return false
		}
	}
	for e := range p.planned {
		if e.pulling == pl {
			return false
		}
	}
	if time.Since(pl.touched) < forgotten {
		return false
	}
	delete(p.pulls, pl.key)
	p.watch.ended(pl, "no layer was stored for a while; the pull was cancelled or failed")
	p.s.syncer.kick()
	return true
}

// reconsider decides again for a layer whose storing has not been seen to
// begin, and swings its link if the answer has changed. Called with p.mu held.
func (p *placer) reconsider(ctx context.Context, e *extract) {
	pl := e.pulling
	if pl.layers[e.index].Downloaded {
		// The blob arrived between two looks. containerd may be writing: the
		// link stays where it was decided to be while the download still ran.
		e.since = time.Now()
		e.decision.Input = p.input(pl, e.index)
		p.bind(ctx, e)
		return
	}
	d := p.s.config.Policy.Decide(p.input(pl, e.index))
	if d.Tier == e.tier() {
		e.decision = d
		return
	}
	err := p.s.tiers.Swing(e.id, d.Tier)
	if err != nil {
		if !errors.Is(err, tier.ErrStoring) {
			log.G(ctx).WithError(err).WithField("id", e.id).Warn("cannot change the tier of a layer")
		}
		if on, err := p.s.tiers.StagedOn(e.id); err == nil {
			e.decision.Tier = on // however far the swing came
		}
		p.bind(ctx, e)
		return
	}
	e.swings++
	p.swings.Inc()
	pl.placed[e.index].tier = d.Tier
	e.decision = d
	p.announce(ctx, e, "swung")
	p.watch.swung(e)
}

// bind settles the tier of a layer: its storing has begun. Called with p.mu held.
func (p *placer) bind(ctx context.Context, e *extract) {
	e.bound, e.unsaved = true, true
	if e.pulling != nil {
		q := &e.pulling.placed[e.index]
		q.storing, q.tier = true, e.tier()
	}
	p.announce(ctx, e, "storing")
	p.decisions.WithLabelValues(e.tier().String()).Inc()
	p.watch.decided(e)
}

// announce logs one line per event of a layer, for operators and tests.
func (p *placer) announce(ctx context.Context, e *extract, what string) {
	f := log.Fields{"id": e.id, "tier": e.tier().String(), "reason": e.decision.Reason, "policy": e.decision.Policy}
	if e.pulling != nil {
		f["layer"] = e.index
		f["image"] = e.pulling.img.Name
		f["digest"] = e.pulling.img.Layers[e.index].Digest.String()
	}
	log.G(ctx).WithFields(f).Info("layer " + what)
}
