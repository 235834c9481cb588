// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// placing says where the files of one layer go while they are unpacked.
type placing struct {
	p     *pulls
	pl    *pulling
	index int

	once     sync.Once
	decision placement.Decision // of policies that place whole layers; else the state when unpacking began

	// The rest belongs to the goroutine that unpacks, but for what progress brings.
	sum   placement.Summary
	in    placement.FileInput
	fresh time.Time // when in was made
	nvm   int64     // bytes placed on NVM since
	files int64     // files placed there since

	hole      bool // the last file is a hole in the pack
	followers int  // as in placement.FileInput
	began     time.Time
	known     bool          // what is hot is known
	early     []unpack.File // placed before it was
	whole     bool          // the blob was there when unpacking began: its rate is that of unpacking
	mu        sync.Mutex
	read      int64 // compressed bytes that were read
	tar       int64 // uncompressed bytes that came of them
}

// stale is how old the view of a pull may be by which files are placed, and
// staleBytes how much may go to NVM by it: one look asks the kernel and the pull.
const (
	stale      = 20 * time.Millisecond
	staleBytes = 8 << 20
)

// commitTime is the least time in seconds that containerd takes to have a layer
// prepared and committed: some transactions in its database on a hard disk
// (docs/bench.md).
const commitTime = 0.1

// spec is the unpacking of the layer as the store takes it.
func (j *placing) spec() store.Spec {
	l := j.pl.img.Layers[j.index]
	s := store.Spec{
		Namespace: j.pl.img.Namespace, Blob: l.Digest, Size: l.Size, MediaType: l.MediaType, DiffID: l.DiffID,
		Place: j.place, Ended: j.catchUp, Decision: j.text, Progress: j.progress,
	}
	if j.p.s.config.Policy.Late() {
		s.Gate = j.arrived
	}
	return s
}

// specOf is that of a snapshot whose pull an earlier run of the daemon has seen:
// everything goes to the pack.
func specOf(sn store.Snapshot) (store.Spec, bool) {
	d, err := digest.Parse(sn.Image.Digest)
	if err != nil {
		return store.Spec{}, false
	}
	return store.Spec{Namespace: sn.Namespace, Blob: d, Size: sn.Image.Size, MediaType: ocispec.MediaTypeImageLayer}, true
}

// arrived returns when the blob of the layer is whole: the paper's rule decides
// when storing begins, which is then. It also returns when the pull is over, after which nobody looks at its downloads: a
// client that has an applier of its own may commit all layers before the daemon has seen that the last one is there, and
// another pull may wait for the layer of one that was given up. What is missing of the blob is waited for where it is read.
func (j *placing) arrived(ctx context.Context) error {
	for {
		j.p.mu.Lock()
		down, changed := j.pl.layers[j.index].Downloaded, j.pl.changed
		j.p.mu.Unlock()
		if down {
			return nil
		}
		select {
		case <-changed:
		case <-j.pl.over:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin makes the decision for the layer, when its first file is placed.
func (j *placing) begin() {
	j.once.Do(func() {
		p := j.p
		j.began = time.Now()
		p.mu.Lock()
		in := p.input(j.pl, j.index)
		j.whole = j.pl.layers[j.index].Downloaded
		j.decision = p.s.config.Policy.Decide(in)
		q := &j.pl.placed[j.index]
		q.storing, q.tier = true, j.decision.Tier
		reason := j.decision.Reason
		if p.s.config.Policy.ByFile() { // text has the decision
			q.tier, reason = placement.HDD, "its files are placed one by one"
		} else {
			p.watch.decided(j.pl, j.index, j.message())
		}
		p.mu.Unlock()
		log.L.WithFields(log.Fields{
			"layer": j.index, "image": j.pl.img.Name, "digest": j.pl.img.Layers[j.index].Digest, "policy": j.decision.Policy, "reason": reason,
		}).Info("layer storing")
	})
}

// place implements [store.Spec.Place].
func (j *placing) place(f unpack.File) unpack.Placement {
	j.begin()
	if !j.known {
		j.known = j.pl.isAsked()
	}
	hot := false
	if j.known {
		hot, _ = j.pl.hot.File(j.index, f.Path)
	} else if len(j.early) < mostEarly {
		j.early = append(j.early, f)
	}
	if now := time.Now(); now.Sub(j.fresh) > stale || j.nvm > staleBytes {
		j.in, j.fresh, j.nvm, j.files = j.p.fileInput(j), now, 0, 0
	}
	in := j.in
	in.Hole, in.Followers = j.hole, j.followers
	in.NVMPromised += j.nvm
	if in.NVMInodesFree >= 0 {
		in.NVMInodesFree = max(0, in.NVMInodesFree-j.files)
	}
	d := j.p.s.config.Policy.PlaceFile(placement.File{Path: f.Path, Size: f.Size, Hot: hot, HotBy: heat(j.pl.hot.How)}, in)
	in.After(d)
	j.hole, j.followers = in.Hole, in.Followers
	j.sum.Add(d)
	if d.Place.OnNVM() {
		j.nvm += d.NVMBytes()
		j.files++
	}
	j.p.s.metrics.placed.WithLabelValues(d.Place.String()).Add(float64(f.Size))
	switch d.Place {
	case placement.PlaceNVM:
		return unpack.ToNVM
	case placement.PlaceBoth:
		return unpack.ToBoth
	}
	return unpack.ToPack
}

// heat names how it is known what is hot, as placement has it.
func heat(k hif.Knowledge) string {
	switch k {
	case hif.Predicted:
		return "static analysis"
	case hif.Inherited:
		return "inherited"
	}
	return "profile"
}

const (
	// hotTimeout bounds the question to the registry what is hot of an image.
	hotTimeout = 10 * time.Second
	// hotWait is how long the first file of a pull waits for the answer, which the
	// book of this node has at once.
	hotWait = 100 * time.Millisecond
	// mostEarly bounds the files of a layer that are remembered because they were
	// placed before the answer came.
	mostEarly = 50_000
)

// askHot finds out which files of an image that is being pulled are hot.
func (p *pulls) askHot(ctx context.Context, pl *pulling) {
	defer close(pl.asked)
	if p.s.hot == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, hotTimeout)
	defer cancel()
	pl.hot = p.s.hot.Hot(ctx, arriving(pl.img))
}

// isAsked reports whether it is known what is hot. The first that asks waits a moment.
func (pl *pulling) isAsked() bool {
	select {
	case <-pl.asked:
		return true
	default:
	}
	pl.waited.Do(func() {
		select {
		case <-pl.asked:
		case <-time.After(hotWait):
		}
	})
	select {
	case <-pl.asked:
		return true
	default:
		return false
	}
}

// catchUp brings files to NVM that were placed before it was known that they are
// hot: their bytes are still in the page cache, as part of the pack. NVM without
// room ends it.
func (j *placing) catchUp(id store.LayerID) {
	if len(j.early) == 0 || !j.pl.isAsked() {
		return
	}
	for _, f := range j.early {
		if hot, _ := j.pl.hot.File(j.index, f.Path); !hot {
			continue
		}
		d := j.p.s.config.Policy.PlaceFile(placement.File{Path: f.Path, Size: f.Size, Hot: true, HotBy: heat(j.pl.hot.How)}, j.p.fileInput(j))
		if !d.Place.OnNVM() {
			return
		}
		if err := j.p.s.store.PromoteNew(id, f.Number); err != nil {
			log.L.WithError(err).WithField("layer", id).Warn("a hot file could not be brought to NVM")
			return
		}
	}
	j.early = nil
}

// progress implements [store.Spec.Progress].
func (j *placing) progress(compressed, uncompressed int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.read, j.tar = compressed, uncompressed
}

// text is the decision as the record keeps it.
func (j *placing) text(r unpack.Result) json.RawMessage {
	j.begin()
	if j.whole {
		j.p.s.store.Rates.SawUnpack(r.Uncompressed, time.Since(j.began))
	}
	if j.p.s.config.Policy.ByFile() {
		j.decision = j.sum.Decision(j.p.s.config.Policy, j.decision.Input)
		j.p.mu.Lock()
		j.pl.placed[j.index].tier = j.decision.Tier
		j.p.watch.decided(j.pl, j.index, j.message())
		j.p.mu.Unlock()
	} else {
		sum := j.sum
		j.decision.Files = &sum
	}
	j.p.s.metrics.layers.WithLabelValues(j.decision.Tier.String()).Inc()
	b, err := protojson.Marshal(j.message())
	if err != nil { // a message of numbers and valid UTF-8 always marshals; a name may be neither
		log.L.WithError(err).Warn("cannot record a decision")
		return nil
	}
	return b
}

// message is the decision as it is shown.
func (j *placing) message() *control.Decision {
	m := control.NewDecision(j.decision)
	m.Image = j.pl.img.Name
	return m
}

// input is all that a decision for layer i may look at. The layers below may still
// download, also where the client unpacks one after the other: each is stored when
// it arrives. Called with mu held.
func (p *pulls) input(pl *pulling, i int) placement.Input {
	in := placement.Input{
		Index: i, Layers: slices.Clone(pl.layers), Concurrency: concurrency,
		Bandwidth: pl.bandwidth.Rate(), ContentOnHDD: p.contentOnHDD,
	}
	in.HDDRate, in.UnpackRate = p.s.store.Rates.Get()
	for j, q := range pl.placed {
		in.Layers[j].Storing, in.Layers[j].Stored, in.Layers[j].Tier = q.storing && !q.stored, q.stored, q.tier
	}
	free, total, err := p.s.store.Tiers.Space(placement.NVM)
	if err != nil {
		log.L.WithError(err).Warn("NVM counts as full")
	}
	in.NVMFree, in.NVMReserve = free, p.s.store.Reserve(total)
	in.NVMPromised = p.promised(pl)
	in.HDDBacklog = p.s.store.Backlog()
	return in
}

// promised is how many bytes of NVM the layers of other pulls may still take that
// go there as a whole. Called with mu held.
func (p *pulls) promised(but *pulling) (sum int64) {
	if p.s.config.Policy.ByFile() {
		return 0
	}
	for _, pl := range p.byKey {
		if pl == but {
			continue
		}
		for i, q := range pl.placed {
			if q.storing && !q.stored && q.tier == placement.NVM {
				sum += placement.Footprint(pl.layers[i].Size())
			}
		}
	}
	return sum
}

// PromisedNVM tells how many bytes of NVM are promised to layers that are being
// stored. Some of them may be there already.
func (s *Snapshotter) PromisedNVM() int64 {
	s.pulls.mu.Lock()
	defer s.pulls.mu.Unlock()
	return s.pulls.promised(nil)
}

// fileInput is all that the placing of a file may look at.
func (p *pulls) fileInput(j *placing) placement.FileInput {
	p.mu.Lock()
	defer p.mu.Unlock()
	pl := j.pl
	in := placement.FileInput{Tier: j.decision.Tier, ContentOnHDD: p.contentOnHDD, Bandwidth: pl.bandwidth.Rate(), Backlog: p.s.store.Backlog()}
	in.HDDRate, in.UnpackRate = p.s.store.Rates.Get()
	room, err := p.s.store.Room(placement.NVM)
	if err != nil {
		log.L.WithError(err).Warn("NVM counts as full")
	}
	in.NVMFree, in.NVMReserve, in.NVMInodesFree = room.Free, room.Reserve, -1
	if room.Inodes > 0 {
		_, in.NVMInodesFree = room.Left()
	}
	in.NVMPromised = p.promised(pl)
	var blobs []placement.Progress
	seen := map[string]bool{}
	for i, l := range pl.layers {
		q := pl.placed[i]
		if q.job == nil || seen[l.Digest] {
			continue
		}
		seen[l.Digest] = true
		b := placement.Progress{Compressed: l.Compressed, Arrived: l.Offset}
		if l.Downloaded {
			b.Arrived = l.Compressed
		}
		q.job.mu.Lock()
		b.Read, b.Unpacked = q.job.read, q.job.tar
		q.job.mu.Unlock()
		blobs = append(blobs, b)
	}
	in.Left, in.ToUnpack = placement.Rest(blobs)
	for _, q := range pl.placed {
		if !q.stored {
			in.Commit += commitTime
		}
	}
	return in
}
