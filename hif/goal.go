// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/placement"
)

// Overview is what the last plan was made of.
type Overview struct {
	Layers        int             // that stand on this node
	SettledLayers map[string]bool // ids of those of which only hot files stay
	HotOnNVM      int64           // bytes of hot files of settled layers that are on NVM, without parts
	Space         plan.Space
	Plan          plan.Plan
}

// Overview returns what the last plan was made of.
func (m *Manager) Overview() Overview {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// wanted is what an image needs, and how that is known.
type wanted struct {
	Image
	profile.Profile
	Knowledge
	Hot []hotFile
}

// want reads what is known of an image.
func (m *Manager) want(ctx context.Context, image Image) (wanted, error) {
	p, k, err := m.known(image.Digest)
	if err != nil {
		return wanted{}, err
	}
	hot, err := m.library.hot(ctx, image, &p)
	return wanted{image, p, k, hot}, err
}

// settled tells whether what is not hot is cold.
func (k Knowledge) settled() bool { return k == Traced || k == Inherited || k == Pulled }

func (k Knowledge) forPlan(hot int) plan.Knowledge {
	switch {
	case k.settled():
		return plan.Traced
	case k == Nothing && hot == 0:
		return plan.Unknown
	}
	return plan.Predicted
}

// used is when the image was last started, or became known.
func (w *wanted) used() time.Time { return w.Updated }

// apply makes a plan and hands it to the engine.
func (m *Manager) apply(ctx context.Context, images []Image) error {
	in := plan.Input{Now: time.Now(), Limits: m.config.Limits, Disk: m.config.Disk}
	var err error
	if in.Layers, err = m.store.Layers(ctx); err != nil {
		return err
	}
	var wants []wanted
	unclear := map[string]bool{} // ids of layers
	for _, image := range images {
		w, err := m.want(ctx, image)
		switch {
		case err == nil:
			wants = append(wants, w)
		case ctx.Err() != nil:
			return err
		default:
			// It must not keep the others from their plan, nor lose what it may need.
			log.G(ctx).WithError(err).WithField("image", image.name()).Warn("what an image needs cannot be read; its layers stay as they are")
			for _, id := range image.Chain {
				unclear[id] = true
			}
		}
	}
	home := map[string]bool{}
	for i := range in.Layers {
		l := &in.Layers[i]
		if unclear[l.ID] && l.Fixed == "" {
			l.Fixed = "what an image of it needs cannot be read"
		}
		home[l.ID] = l.Tier == placement.HDD && l.Fixed == ""
	}
	divisions := m.divisions(wants, home)
	o := Overview{Layers: len(in.Layers), SettledLayers: map[string]bool{}}
	here := map[string]int64{} // hot files that stand on NVM whole
	for _, w := range wants {
		in.Images = append(in.Images, m.forPlan(w, divisions[w.View], here))
		if w.settled() {
			for _, id := range w.Chain {
				o.SettledLayers[id] = true
			}
		}
	}
	if in.Space, err = m.store.Space(); err != nil {
		return err
	}
	m.mu.Lock()
	in.Pressing = m.last.Plan.Pressure
	m.mu.Unlock()
	if m.engine != nil {
		in.Space.Pinned = m.engine.Progress().Pinned
	}
	o.Space, o.Plan = in.Space, plan.Decide(in)
	for redirect, size := range here {
		if o.SettledLayers[layerOf(redirect)] {
			o.HotOnNVM += size
		}
	}
	m.mu.Lock()
	m.last = o
	m.mu.Unlock()
	if m.engine == nil {
		return nil
	}
	m.engine.Apply(o.Plan)
	m.mu.Lock()
	if m.hurry { // with the lock, so that Pause comes before or after
		m.engine.Now()
	}
	m.mu.Unlock()
	m.startDividing(divisions, o.Plan)
	m.cool(wants, in.Layers)
	return nil
}

// forPlan is an image as the plan sees it. A file of which parts are kept is
// not hot as a whole; until its parts are there it stays where it is.
func (m *Manager) forPlan(w wanted, d *division, here map[string]int64) plan.Image {
	divided := map[string]bool{}
	if d != nil {
		for _, f := range d.set.Files {
			divided[f.Redirect] = true
		}
	}
	p := plan.Image{ID: w.name(), Knowledge: w.forKnowledge(), Used: w.used(), Layers: w.Chain}
	for _, h := range w.Hot {
		f := plan.File{Redirect: h.Redirect, Size: h.Size, Weight: h.Weight, Pinned: h.Pinned}
		if stands, err := m.host.Stands(f.Redirect); err == nil {
			f.OnNVM = stands
		}
		if divided[f.Redirect] && (d.have[f.Redirect] || !f.OnNVM) {
			continue
		}
		if f.OnNVM {
			here[f.Redirect] = f.Size
		}
		p.Hot = append(p.Hot, f)
	}
	return p
}

func (w *wanted) forKnowledge() plan.Knowledge { return w.Knowledge.forPlan(len(w.Hot)) }

// startDividing has parts made that are wanted, unless that is under way. In a
// store that is full, that is above the high watermark, old ones go instead, of the
// chain used longest ago.
func (m *Manager) startDividing(divisions map[string]*division, p plan.Plan) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dividing || m.closed {
		return
	}
	var todo, unwanted []*division
	for _, d := range divisions {
		rested := time.Since(m.undivided[d.view].at) > partsRetry
		switch {
		case len(d.set.Files) == 0 && rested:
			unwanted = append(unwanted, d)
		case p.Full && len(d.have) > 0:
			todo = append(todo, d)
		case !p.Pressure && !d.current && d.home && rested:
			todo = append(todo, d)
		}
	}
	slices.SortFunc(todo, func(a, b *division) int { return b.used.Compare(a.used) })
	if p.Full && len(todo) > 0 {
		last := todo[len(todo)-1]
		last.set = parts.Set{}
		m.undivided[last.view] = undivided{at: time.Now()}
		todo = []*division{last}
	}
	todo = append(unwanted, todo...)
	if len(todo) == 0 {
		return
	}
	m.dividing = true
	m.wg.Go(func() {
		m.divide(todo, p.Floor)
		m.kickAnd(func() { m.dividing = false })
	})
}

func layerOf(redirect string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(redirect, "/"), "/")
	return id
}

func want(redirect string, size int64, ranges []profile.Range) parts.Want {
	w := parts.Want{Redirect: redirect, Size: size}
	for _, r := range ranges {
		w.Ranges = append(w.Ranges, parts.Range(r))
	}
	return w
}

// name is the image for people.
func (i Image) name() string {
	if i.Name != "" {
		return i.Name
	}
	return i.Digest.String()
}
