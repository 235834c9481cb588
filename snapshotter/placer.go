// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// Downloads tells what containerd downloads; implemented by [pull.Watcher].
type Downloads interface {
	Find(ctx context.Context, namespace, chainID string, labels map[string]string) (*pull.Image, int, error)
	Progress(ctx context.Context, img *pull.Image) ([]placement.Layer, error)
	// Subscribe returns a channel that is sent to after something has arrived
	// in a namespace ("": any), and a function that ends the subscription.
	Subscribe(namespace string) (<-chan struct{}, func())
}

const (
	// drainEvery bounds how long layers written to HDD stay in the page cache
	// while a pull goes on. The kernel would leave them for up to 30 s
	// (vm.dirty_expire_centisecs), and the pull would wait for them at its end.
	drainEvery = 500 * time.Millisecond
	// forgotten is when a pull of which nothing was heard counts as given up.
	forgotten = 30 * time.Second
	// askTimeout bounds what Prepare waits for containerd's answers.
	askTimeout = 2 * time.Second
	// concurrency is containerd's default max_concurrent_downloads. It matters
	// for the expected LDL only, which is shown, not acted upon.
	concurrency = 3
	// sizeUnknown is what a layer counts on NVM of which containerd tells nothing.
	sizeUnknown = 1 << 30
)

// placer decides on which tier layers are stored, and changes its mind for as
// long as a layer's storing has not begun (docs/design.md, section 2).
type placer struct {
	s      *Snapshotter
	stop   context.CancelFunc
	done   chan struct{}
	wake   chan struct{}
	watch  watchers
	mu     sync.Mutex
	pulls  map[string]*pulling // by namespace and manifest
	active map[string]*extract // by snapshot id
	unpack float64             // bytes/s at which layers are unpacked, lately

	decisions *prometheus.CounterVec
	swings    prometheus.Counter
}

// pulling is one image that is being unpacked.
type pulling struct {
	key       string
	img       *pull.Image
	layers    []placement.Layer // as last seen
	placed    []placed          // by layer
	bandwidth pull.Bandwidth
	parallel  bool // containerd unpacks several layers at once
	began     time.Time
	touched   time.Time
	drained   time.Time
	shown     []shown // what watchers know
}

// placed is how far a layer is with containerd's unpacker.
type placed struct {
	prepared, storing, stored bool
	tier                      placement.Tier
}

// extract is one layer between Prepare and Commit.
type extract struct {
	id       string
	ns       string
	pulling  *pulling // nil: containerd tells nothing of its image
	index    int
	decision placement.Decision
	bound    bool // storing has begun, or nothing is known that could change the tier
	since    time.Time
	swings   int
}

func (e *extract) tier() placement.Tier { return e.decision.Tier }

func (e *extract) image() *imageRef {
	if e.pulling == nil {
		return nil
	}
	img, l := e.pulling.img, e.pulling.img.Layers[e.index]
	return &imageRef{Name: img.Name, Manifest: img.Manifest.String(), Index: e.index, Layers: len(img.Layers), Digest: l.Digest.String(), Size: l.Size}
}

func newPlacer(s *Snapshotter) *placer {
	ctx, stop := context.WithCancel(context.Background())
	p := &placer{
		s: s, stop: stop, done: make(chan struct{}), wake: make(chan struct{}, 1),
		pulls: map[string]*pulling{}, active: map[string]*extract{},
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nhybrid_layers_placed_total", Help: "Layers by the tier that storing them began on.",
		}, []string{"tier"}),
		swings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "nhybrid_swings_total", Help: "Changes of a layer's tier between Prepare and the start of its storing.",
		}),
	}
	go p.run(ctx)
	return p
}

func (p *placer) close() {
	p.stop()
	<-p.done
	p.watch.close()
}

// plan makes the first decision for a layer, before its snapshot exists. It
// never fails: what cannot be learned is decided without.
func (p *placer) plan(ctx context.Context, ns, chainID, parent string, labels map[string]string) *extract {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	e := &extract{ns: ns, since: time.Now()}
	pl, index, err := p.find(ctx, ns, chainID, labels)
	if err != nil {
		log.G(ctx).WithError(err).WithField("chain_id", chainID).Debug("placing a layer without knowing its image")
		p.mu.Lock()
		defer p.mu.Unlock()
		e.bound = true
		e.decision = p.s.config.Policy.Decide(p.input(&pulling{
			layers: []placement.Layer{{Digest: chainID, Uncompressed: sizeUnknown, Downloaded: true}},
			placed: make([]placed, 1),
		}, 0))
		return e
	}
	layers, err := p.s.config.Downloads.Progress(ctx, pl.img)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		pl.saw(layers)
	} else {
		log.G(ctx).WithError(err).Warn("placing a layer without knowing what is downloading")
	}
	pl.parallel = pl.parallel || (index > 0 && parent == "")
	e.pulling, e.index = pl, index
	e.decision = p.s.config.Policy.Decide(p.input(pl, index))
	e.bound = pl.layers[index].Downloaded
	return e
}

// find returns the pull that a layer belongs to.
func (p *placer) find(ctx context.Context, ns, chainID string, labels map[string]string) (*pulling, int, error) {
	if p.s.config.Downloads == nil || chainID == "" {
		return nil, 0, errdefs.ErrNotFound
	}
	img, index, err := p.s.config.Downloads.Find(ctx, ns, chainID, labels)
	if err != nil {
		return nil, 0, err
	}
	if index < 0 || index >= len(img.Layers) {
		return nil, 0, fmt.Errorf("image %s has no layer %d: %w", img.Manifest, index, errdefs.ErrOutOfRange)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	key := ns + "/" + img.Manifest.String()
	pl := p.pulls[key]
	if pl == nil {
		pl = &pulling{key: key, img: img, placed: make([]placed, len(img.Layers)), began: time.Now()}
		pl.layers = make([]placement.Layer, len(img.Layers))
		for i, l := range img.Layers {
			pl.layers[i] = placement.Layer{Digest: l.Digest.String(), Compressed: l.Size}
		}
		p.pulls[key] = pl
		p.watch.began(pl)
	}
	pl.touched = time.Now()
	return pl, index, nil
}

// saw takes in what containerd has told of the downloads.
func (pl *pulling) saw(layers []placement.Layer) {
	if len(layers) != len(pl.placed) {
		return
	}
	pl.layers = layers
	pl.bandwidth.Observe(time.Now(), pull.Received(layers))
}

// input is all that a decision for layer i may look at. Called with p.mu held.
func (p *placer) input(pl *pulling, i int) placement.Input {
	in := placement.Input{
		Index: i, Layers: slices.Clone(pl.layers), Concurrency: concurrency, Sequential: !pl.parallel,
		Bandwidth: pl.bandwidth.Rate(), UnpackRate: p.unpack,
	}
	for j, q := range pl.placed {
		in.Layers[j].Storing, in.Layers[j].Stored, in.Layers[j].Tier = q.storing, q.stored, q.tier
	}
	free, total, err := p.s.tiers.Space(placement.NVM)
	if err != nil {
		log.L.WithError(err).Warn("NVM counts as full")
	}
	in.NVMFree, in.NVMReserve = free, p.s.config.Reserve(total)
	for _, e := range p.active {
		if e.pulling != pl && e.tier() == placement.NVM {
			in.NVMPromised += placement.Footprint(e.decision.Input.Layers[e.decision.Input.Index].Size())
		}
	}
	in.HDDBacklog, in.HDDRate = p.s.syncer.backlog()
	return in
}

// began tells that a layer's snapshot exists now.
func (p *placer) began(ctx context.Context, e *extract, id string, on placement.Tier) {
	p.mu.Lock()
	e.id = id
	if e.decision.Tier != on {
		e.decision.Tier, e.decision.Admitted = on, false
		e.decision.Reason += "; NVM had no room for a directory"
	}
	p.active[id] = e
	if e.pulling != nil {
		q := &e.pulling.placed[e.index]
		q.tier, q.prepared, q.storing = e.tier(), true, e.bound
		e.pulling.touched = time.Now()
	}
	p.announce(ctx, e, "prepared")
	if e.bound {
		p.settled(ctx, e)
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// committed tells that a layer is stored.
func (p *placer) committed(ctx context.Context, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.active[id]
	if e == nil {
		return
	}
	delete(p.active, id)
	if !e.bound {
		// Stored between two looks: what was decided last is what was done.
		e.bound = true
		p.settled(ctx, e)
	}
	pl := e.pulling
	if pl == nil {
		return
	}
	pl.placed[e.index] = placed{prepared: true, stored: true, tier: e.tier()}
	pl.touched = time.Now()
	if n, took := pl.layers[e.index].Size(), time.Since(e.since).Seconds(); n > 1<<20 && took > 0 {
		p.unpack = ewma(p.unpack, float64(n)/took)
	}
	p.watch.stored(pl, e.index)
	if e.index == len(pl.placed)-1 { // commits come bottom first, in parallel unpacking too
		delete(p.pulls, pl.key)
		p.watch.ended(pl, "")
	}
}

// removed tells that a snapshot is gone; a pull may have been cancelled.
func (p *placer) removed(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.active[id]; e != nil {
		delete(p.active, id)
		if e.pulling != nil {
			e.pulling.placed[e.index] = placed{}
		}
	}
}

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
		if time.Since(pl.drained) > drainEvery && p.storingOnHDD(pl) {
			pl.drained = time.Now()
			p.s.syncer.drain()
		}
		p.mu.Unlock()
	}
}

func (p *placer) storingOnHDD(pl *pulling) bool {
	return slices.ContainsFunc(pl.placed, func(q placed) bool { return q.storing && q.tier == placement.HDD })
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
	if time.Since(pl.touched) < forgotten {
		return false
	}
	delete(p.pulls, pl.key)
	p.watch.ended(pl, "no layer was stored for a while; the pull was cancelled or failed")
	return true
}

// reconsider decides again for a layer whose storing has not been seen to
// begin, and swings its link if the answer has changed. Called with p.mu held.
func (p *placer) reconsider(ctx context.Context, e *extract) {
	pl := e.pulling
	if pl.layers[e.index].Downloaded {
		// The blob arrived between two looks. containerd may be writing: the
		// link stays where it was decided to be while the download still ran.
		e.bound, e.since = true, time.Now()
		e.decision.Input = p.input(pl, e.index)
		p.settled(ctx, e)
		return
	}
	d := p.s.config.Policy.Decide(p.input(pl, e.index))
	if d.Tier != e.tier() {
		switch err := p.s.tiers.Swing(e.id, d.Tier); {
		case errors.Is(err, tier.ErrStoring):
			e.bound = true
			p.settled(ctx, e)
			return
		case err != nil:
			log.G(ctx).WithError(err).WithField("id", e.id).Warn("cannot change the tier of a layer; it stays where it is")
			return
		}
		e.swings++
		p.swings.Inc()
		pl.placed[e.index].tier = d.Tier
		e.decision = d
		p.announce(ctx, e, "swung")
		p.watch.swung(e)
		return
	}
	e.decision = d
}

// settled writes the decision down once it cannot change any more.
func (p *placer) settled(ctx context.Context, e *extract) {
	if e.pulling != nil {
		e.pulling.placed[e.index].storing = true
		e.pulling.placed[e.index].tier = e.tier()
	}
	p.announce(ctx, e, "storing")
	p.decisions.WithLabelValues(e.tier().String()).Inc()
	p.watch.decided(e)
	d, swings := e.decision, e.swings
	err := p.s.db.updateRecord(context.WithoutCancel(ctx), e.id, func(r *record) {
		r.Tier, r.Decision, r.Decided, r.Swings = d.Tier, &d, time.Now().UTC(), swings
	})
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot record a decision")
	}
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

func ewma(old, sample float64) float64 {
	if old == 0 {
		return sample
	}
	return 0.7*old + 0.3*sample
}

// busy tells whether a pull is going on.
func (p *placer) busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pulls) > 0 || len(p.active) > 0
}
