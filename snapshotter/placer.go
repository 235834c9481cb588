// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
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

// ContentPlace tells where containerd keeps blobs, "" if unknown; implemented
// by [pull.Watcher].
type ContentPlace interface {
	ContentRoot(ctx context.Context) string
}

const (
	// abandoned is when an extraction counts as given up of which no download was
	// heard, and storedLong when one does whose storing has begun: nobody tells of
	// that, and 100 GB on a slow disk take an hour.
	abandoned  = 10 * time.Minute
	storedLong = time.Hour
	// stalled is when a pull between two layers is no longer taken for busy.
	stalled = 2 * time.Second
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
	// planned are those that have no snapshot yet; their space is promised.
	planned map[*extract]bool

	contentOnHDD bool // containerd's blobs share the disk of the HDD tier

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
	touched   time.Time // when something was last heard of it
	received  int64     // bytes, then
	shown     []shown   // what watchers know
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
	unsaved  bool // the record holds an older decision
}

func (e *extract) tier() placement.Tier { return e.decision.Tier }

func (e *extract) image() *imageRef {
	if e.pulling == nil {
		return nil
	}
	img, l := e.pulling.img, e.pulling.img.Layers[e.index]
	return &imageRef{Name: img.Name, Manifest: img.Manifest.String(), Index: e.index, Layers: len(img.Layers), Digest: l.Digest.String(), Size: l.Size}
}

// message is the decision as it is shown.
func (e *extract) message() *control.Decision {
	m := control.NewDecision(e.decision)
	m.Swings = int32(e.swings)
	if e.pulling != nil {
		m.Image = e.pulling.img.Name
	}
	return m
}

// text is the decision as the record keeps it.
func (e *extract) text() json.RawMessage {
	b, err := protojson.Marshal(e.message())
	if err != nil { // a message of numbers and valid UTF-8 always marshals; a name may be neither
		log.L.WithError(err).Warn("cannot record a decision")
		return nil
	}
	return b
}

func newPlacer(s *Snapshotter) *placer {
	return &placer{
		s: s, done: make(chan struct{}), wake: make(chan struct{}, 1),
		pulls: map[string]*pulling{}, active: map[string]*extract{}, planned: map[*extract]bool{},
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nhybrid_layers_placed_total", Help: "Layers by the tier that storing them began on.",
		}, []string{"tier"}),
		swings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "nhybrid_swings_total", Help: "Changes of a layer's tier between Prepare and the start of its storing.",
		}),
	}
}

func (p *placer) start() {
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	go p.run(ctx)
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
		p.planned[e] = true
		e.bound = true
		e.decision = p.s.config.Policy.Decide(p.input(&pulling{
			layers: []placement.Layer{{Digest: chainID, Uncompressed: sizeUnknown, Downloaded: true}},
			placed: make([]placed, 1),
		}, 0))
		return e
	}
	layers, err := p.s.config.Downloads.Progress(ctx, pl.img)
	onHDD := p.askContentRoot(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.contentOnHDD = onHDD
	if err == nil {
		pl.saw(layers)
	} else {
		log.G(ctx).WithError(err).Warn("placing a layer without knowing what is downloading")
	}
	pl.parallel = pl.parallel || (index > 0 && parent == "")
	e.pulling, e.index = pl, index
	e.decision = p.s.config.Policy.Decide(p.input(pl, index))
	e.bound = pl.layers[index].Downloaded
	p.planned[e] = true
	return e
}

// dropped tells that a planned layer gets no snapshot.
func (p *placer) dropped(e *extract) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.planned, e)
}

// resumed tells of an extraction that an earlier run of the daemon began. Where
// it stands is settled, since nobody knows whether its storing has begun.
func (p *placer) resumed(id string, on placement.Tier) {
	p.mu.Lock()
	p.active[id] = &extract{
		id: id, bound: true, since: time.Now().Add(abandoned - storedLong), // its client may be gone
		decision: placement.Decision{Tier: on, Input: placement.Input{Layers: make([]placement.Layer, 1)}},
	}
	p.mu.Unlock()
	p.poke()
}

// poke makes the loop look.
func (p *placer) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
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
	key := ns + "/" + img.Manifest.String()
	p.mu.Lock()
	pl := p.pulls[key]
	p.mu.Unlock()
	if pl == nil {
		if pl, err = p.newPull(ctx, key, img); err != nil {
			return nil, 0, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.pulls[key]; known != nil {
		pl = known
	} else {
		p.pulls[key] = pl
		p.watch.began(pl)
		defer p.poke()
	}
	pl.touched = time.Now()
	return pl, index, nil
}

func (p *placer) newPull(ctx context.Context, key string, img *pull.Image) (*pulling, error) {
	pl := &pulling{key: key, img: img, began: time.Now()}
	pl.layers, pl.placed = make([]placement.Layer, len(img.Layers)), make([]placed, len(img.Layers))
	stored, err := p.s.storedLayers(ctx, img.Namespace)
	if err != nil {
		return nil, err
	}
	for i, l := range img.Layers {
		pl.layers[i] = placement.Layer{Digest: l.Digest.String(), Compressed: l.Size}
		// containerd never downloads a layer whose snapshot it has.
		if t, ok := stored[l.ChainID.String()]; ok {
			pl.placed[i] = placed{prepared: true, stored: true, tier: t}
		}
	}
	return pl, nil
}

// saw takes in what containerd has told of the downloads.
func (pl *pulling) saw(layers []placement.Layer) {
	if len(layers) != len(pl.placed) {
		return
	}
	pl.layers = layers
	now, received := time.Now(), pull.Received(layers)
	pl.bandwidth.Observe(now, received)
	if received != pl.received {
		pl.received, pl.touched = received, now
	}
}

// input is all that a decision for layer i may look at. Called with p.mu held.
func (p *placer) input(pl *pulling, i int) placement.Input {
	in := placement.Input{
		Index: i, Layers: slices.Clone(pl.layers), Concurrency: concurrency, Sequential: !pl.parallel,
		Bandwidth: pl.bandwidth.Rate(), ContentOnHDD: p.contentOnHDD,
	}
	in.HDDRate, in.UnpackRate = p.s.rates.get()
	if p.s.config.HDDRate > 0 {
		in.HDDRate = p.s.config.HDDRate
	}
	for j, q := range pl.placed {
		in.Layers[j].Storing, in.Layers[j].Stored, in.Layers[j].Tier = q.storing, q.stored, q.tier
	}
	free, total, err := p.s.tiers.Space(placement.NVM)
	if err != nil {
		log.L.WithError(err).Warn("NVM counts as full")
	}
	in.NVMFree, in.NVMReserve = free, p.s.config.Reserve(total)
	promise := func(e *extract) {
		if (e.pulling != pl || p.planned[e]) && e.tier() == placement.NVM {
			in.NVMPromised += placement.Footprint(e.decision.Input.Layers[e.decision.Input.Index].Size())
		}
	}
	for _, e := range p.active {
		promise(e)
	}
	for e := range p.planned {
		promise(e)
	}
	in.HDDBacklog = p.s.syncer.backlog()
	return in
}

// began tells that a layer's snapshot exists now.
func (p *placer) began(ctx context.Context, e *extract, id string, on placement.Tier) {
	p.mu.Lock()
	e.id = id
	moved := e.decision.Tier != on
	if moved {
		e.decision.Tier, e.decision.Admitted = on, false
		e.decision.Reason += "; NVM had no room for a directory"
	}
	delete(p.planned, e)
	p.active[id] = e
	if e.pulling != nil {
		q := &e.pulling.placed[e.index]
		q.tier, q.prepared = e.tier(), true
		e.pulling.touched = time.Now()
	}
	p.announce(ctx, e, "prepared")
	if e.bound {
		p.bind(ctx, e)
		e.unsaved = moved // else Prepare has written it
	}
	p.mu.Unlock()
	p.poke()
	p.s.syncer.kick()
}

// committing tells that a layer is about to be committed, and returns its
// decision, which no longer changes; nil if nothing is known of it.
func (p *placer) committing(ctx context.Context, id string) json.RawMessage {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.active[id]
	if e == nil || (e.pulling == nil && e.decision.Policy == "") {
		return nil
	}
	if !e.bound { // stored between two looks: what was decided last is what was done
		p.bind(ctx, e)
	}
	e.unsaved = false
	return e.text()
}

// committed tells that a layer is stored, and where.
func (p *placer) committed(id string, on placement.Tier) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.active[id]
	if e == nil {
		return
	}
	delete(p.active, id)
	pl := e.pulling
	if pl == nil {
		return
	}
	pl.placed[e.index] = placed{prepared: true, stored: true, tier: on}
	pl.touched = time.Now()
	if l := pl.layers[e.index]; l.Exact && !pl.parallel {
		p.s.rates.sawUnpack(l.Size(), time.Since(e.since))
	}
	p.watch.stored(pl, e.index)
	if e.index == len(pl.placed)-1 { // commits come bottom first, in parallel unpacking too
		delete(p.pulls, pl.key)
		p.watch.ended(pl, "")
		p.s.syncer.kick()
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

// busy tells whether a pull is storing layers, or will soon. One that nothing
// was heard of for a while is not waited for.
func (p *placer) busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.active) > 0 {
		return true
	}
	for _, pl := range p.pulls {
		if time.Since(pl.touched) < stalled {
			return true
		}
	}
	return false
}

// storingOnHDD lists the extractions of parallel unpacks that stand on HDD and
// are being written, or are written and wait for their turn to be committed.
func (p *placer) storingOnHDD() (ids []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, e := range p.active {
		if e.bound && e.tier() == placement.HDD && e.pulling != nil && e.pulling.parallel {
			ids = append(ids, id)
		}
	}
	return ids
}

// askContentRoot finds out whether containerd keeps its blobs on the disk of
// the HDD tier. It may ask containerd, so it is not called with p.mu held.
func (p *placer) askContentRoot(ctx context.Context) bool {
	c, ok := p.s.config.Downloads.(ContentPlace)
	return ok && p.s.tiers.OnDevice(placement.HDD, c.ContentRoot(ctx))
}
