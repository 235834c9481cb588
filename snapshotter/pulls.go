// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// Downloads tells what containerd downloads; implemented by [pull.Watcher].
type Downloads interface {
	Find(ctx context.Context, namespace, chainID string, labels map[string]string) (*pull.Image, int, error)
	Progress(ctx context.Context, img *pull.Image) ([]placement.Layer, error)
	// Subscribe returns a channel that is sent to after something has arrived
	// in a namespace ("": any), and a function that ends the subscription.
	Subscribe(namespace string) (<-chan struct{}, func())
	// ContentRoot tells where containerd keeps blobs, "" if unknown.
	ContentRoot(ctx context.Context) string
	// Provider reads blobs of a namespace.
	Provider(ctx context.Context, namespace string) (content.Provider, error)
	// Fetch reads a blob that containerd has lost; see [store.Blobs].
	Fetch(ctx context.Context, namespaces []string, blob ocispec.Descriptor) (io.ReadCloser, string, error)
}

const (
	// abandoned is when an extraction counts as given up of which nothing was heard.
	abandoned = 10 * time.Minute
	// stalled is when a pull between two layers is no longer taken for busy.
	stalled = 2 * time.Second
	// forgotten is when a pull of which nothing was heard counts as given up.
	forgotten = 30 * time.Second
	// mostFailed bounds what is remembered of extractions that were given up.
	mostFailed = 1000
	// askTimeout bounds what Prepare waits for containerd's answers.
	askTimeout = 2 * time.Second
	// concurrency is containerd's default max_concurrent_downloads. It matters
	// for the expected LDL only, which is shown, not acted upon.
	concurrency = 3
)

// pulls is the images that are being pulled: it has their layers unpacked while
// they download, says where the bytes go, and knows when a pull is over.
type pulls struct {
	s     *Snapshotter
	stop  context.CancelFunc
	done  chan struct{}
	wake  chan struct{}
	watch watchers
	wg    sync.WaitGroup

	mu     sync.Mutex
	byKey  map[string]*pulling // by namespace and manifest
	active map[string]*extract // by snapshot id
	failed map[string]bool     // chain ids whose extractions were given up

	contentOnHDD bool // containerd's blobs share the disk of the HDD tier
}

// pulling is one image that is being pulled. Guarded by pulls.mu.
type pulling struct {
	key       string
	img       *pull.Image
	layers    []placement.Layer // as last seen
	placed    []placed          // by layer
	bandwidth pull.Bandwidth
	began     time.Time
	touched   time.Time     // when something was last heard of it
	received  int64         // bytes, then
	shown     []shown       // what watchers know
	changed   chan struct{} // closed when more has arrived
	over      chan struct{} // closed when the pull has ended: nothing changes any more

	asked  chan struct{} // closed when hot is known
	hot    hif.HotSet
	waited sync.Once // for asked
}

// placed is how far a layer of a pull is.
type placed struct {
	layer   store.LayerID // held while the pull runs; 0: it was there
	storing bool          // its bytes are being placed
	stored  bool          // committed
	tier    placement.Tier
	job     *placing // nil: none of ours
}

// extract is one layer between Prepare and Commit.
type extract struct {
	id      string
	chainID string
	pulling *pulling // nil: containerd tells nothing of its image
	index   int
	since   time.Time
	applied bool
	writing bool // containerd's applier writes to its directory in this process, for as long as it takes
}

// image names the image of an extraction; nil if it is not known, or if the layer
// is of a media type that only its applier can read: what that one writes stays.
func (e *extract) image() *store.ImageRef {
	if e == nil || e.pulling == nil || !unpack.Supports(e.pulling.img.Layers[e.index].MediaType) {
		return nil
	}
	img, l := e.pulling.img, e.pulling.img.Layers[e.index]
	return &store.ImageRef{Name: img.Name, Manifest: img.Manifest.String(), Index: e.index, Layers: len(img.Layers), Digest: l.Digest.String(), Size: l.Size}
}

// estimate is how many bytes an applier that is not ours may write. An
// extraction that was given up before may have failed for want of room.
func (p *pulls) estimate(e *extract) int64 {
	if e == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.failed[e.chainID]:
		return math.MaxInt64
	case e.pulling == nil:
		return 0
	}
	return placement.Footprint(e.pulling.layers[e.index].Size())
}

func newPulls(s *Snapshotter) *pulls {
	return &pulls{s: s, done: make(chan struct{}), wake: make(chan struct{}, 1), byKey: map[string]*pulling{}, active: map[string]*extract{}, failed: map[string]bool{}}
}

func (p *pulls) start() {
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	go p.run(ctx)
}

func (p *pulls) close() {
	if p.stop != nil {
		p.stop()
		<-p.done
	}
	p.wg.Wait()
	p.watch.close()
}

// poke makes the loop look.
func (p *pulls) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// prepare tells that a layer is asked for. The layers of its image that the store
// lacks begin to be unpacked. It never fails: a layer of which nothing can be
// learned is stored as the client's applier brings it.
func (p *pulls) prepare(ctx context.Context, ns, chainID string, labels map[string]string) *extract {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	e := &extract{since: time.Now(), chainID: chainID}
	pl, index, err := p.find(ctx, ns, chainID, labels)
	if err != nil {
		log.G(ctx).WithError(err).WithField("chain_id", chainID).Debug("a layer is stored without knowing its image")
		return e
	}
	e.pulling, e.index = pl, index
	return e
}

// find returns the pull that a layer belongs to, and begins it if it is new.
func (p *pulls) find(ctx context.Context, ns, chainID string, labels map[string]string) (*pulling, int, error) {
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
	pl := p.byKey[key]
	if pl != nil {
		pl.touched = time.Now()
	}
	p.mu.Unlock()
	if pl == nil {
		if pl, err = p.begin(ctx, key, img); err != nil {
			return nil, 0, err
		}
	}
	return pl, index, nil
}

// begin has the layers of an image unpacked that are not there.
func (p *pulls) begin(ctx context.Context, key string, img *pull.Image) (*pulling, error) {
	n := len(img.Layers)
	pl := &pulling{key: key, img: img, began: time.Now(), touched: time.Now(), layers: make([]placement.Layer, n), placed: make([]placed, n), changed: make(chan struct{}), over: make(chan struct{}), asked: make(chan struct{})}
	for i, l := range img.Layers {
		pl.layers[i] = placement.Layer{Digest: l.Digest.String(), Compressed: l.Size}
	}
	committed, err := p.s.committedLayers(ctx, img.Namespace)
	if err != nil {
		return nil, err
	}
	layers, err := p.s.config.Downloads.Progress(ctx, img)
	if err != nil {
		log.G(ctx).WithError(err).Warn("a pull begins without knowing what is downloading")
	}
	root := p.s.config.Downloads.ContentRoot(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.byKey[key]; known != nil {
		return known, nil
	}
	p.byKey[key] = pl
	p.contentOnHDD = p.s.store.Tiers.OnDevice(placement.HDD, root)
	pl.saw(layers)
	for i, l := range img.Layers {
		if committed[l.ChainID.String()] { // containerd asks for no layer whose snapshot it has
			pl.placed[i].stored = true
			continue
		}
		if !unpack.Supports(l.MediaType) { // encrypted, say: it comes by path
			continue
		}
		job := &placing{p: p, pl: pl, index: i}
		pl.placed[i].job = job
	}
	p.watch.began(pl)
	p.poke()
	p.wg.Go(func() { p.askHot(context.WithoutCancel(ctx), pl) })
	p.wg.Go(func() { p.unpack(context.WithoutCancel(ctx), pl) })
	return pl, nil
}

// unpack begins the unpackings of a pull, the lowest layer first.
func (p *pulls) unpack(ctx context.Context, pl *pulling) {
	for i := range pl.img.Layers {
		p.mu.Lock()
		job, over := pl.placed[i].job, p.byKey[pl.key] != pl
		p.mu.Unlock()
		if job == nil || over {
			continue
		}
		id, _, err := p.s.store.Begin(ctx, job.spec())
		if err != nil {
			log.G(ctx).WithError(err).Warn("a layer is not unpacked while it downloads")
			continue
		}
		p.mu.Lock()
		if p.byKey[pl.key] == pl {
			pl.placed[i].layer = id
			p.mu.Unlock()
			continue
		}
		p.mu.Unlock()
		p.s.store.Release(id) // the pull was over before
	}
}

// saw takes in what containerd has told of the downloads. Called with mu held.
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
	close(pl.changed)
	pl.changed = make(chan struct{})
}

// prepared tells that a layer's snapshot exists now.
func (p *pulls) prepared(e *extract, id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.id = id
	p.active[id] = e
	if e.pulling != nil {
		e.pulling.touched = time.Now()
	}
	p.poke()
}

// dropped tells that a layer gets no snapshot.
func (p *pulls) dropped(*extract) { p.poke() }

// spec says how the layer of an extraction is unpacked; false if its image is not known.
func (p *pulls) spec(id string, sn store.Snapshot) (store.Spec, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.active[id]; e != nil && e.pulling != nil {
		e.pulling.touched = time.Now()
		if job := e.pulling.placed[e.index].job; job != nil {
			return job.spec(), true
		}
	}
	if sn.Image == nil { // of an earlier run of the daemon, the record tells
		return store.Spec{}, false
	}
	return specOf(sn)
}

// written tells that containerd's applier begins to write a layer here, or has ended.
func (p *pulls) written(id string, over bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.active[id]; e != nil {
		e.writing, e.since = !over, time.Now()
		if e.pulling != nil {
			e.pulling.touched = e.since
		}
	}
}

// applied tells that Apply has bound a layer.
func (p *pulls) applied(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.active[id]; e != nil {
		e.applied = true
		if e.pulling != nil {
			e.pulling.touched = time.Now()
		}
	}
}

// committed tells that a layer's snapshot is committed.
func (p *pulls) committed(id string) {
	p.mu.Lock()
	e := p.active[id]
	if e == nil {
		p.mu.Unlock()
		return
	}
	delete(p.active, id)
	delete(p.failed, e.chainID)
	pl := e.pulling
	over := false
	if pl != nil {
		pl.placed[e.index].stored = true
		pl.layers[e.index].Downloaded = true // whether or not the downloads were looked at since
		pl.touched = time.Now()
		p.watch.stored(pl, e.index)
		over = !slices.ContainsFunc(pl.placed, func(q placed) bool { return !q.stored })
	}
	p.mu.Unlock()
	if over {
		p.end(pl, "")
	}
}

// busy reports whether a pull is storing layers, or will soon. One that nothing
// was heard of for a while is not waited for.
func (p *pulls) busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pl := range p.byKey {
		if time.Since(pl.touched) < stalled {
			return true
		}
	}
	for _, e := range p.active {
		if e.writing {
			return true
		}
	}
	return false
}

// Count is the number of pulls.
func (p *pulls) Count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.byKey)
}

// committedLayers is the chain ids that a namespace has.
func (s *Snapshotter) committedLayers(ctx context.Context, ns string) (map[string]bool, error) {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return nil, err
	}
	have := map[string]bool{}
	for _, e := range all {
		if e.Info.Kind == snapshots.KindCommitted && e.NS() == ns {
			have[store.ClientKey(e.Info.Name)] = true
		}
	}
	return have, nil
}
