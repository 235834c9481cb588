// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"math"
	"time"
)

// outcome is what one simulated pull came to. Times are seconds since its start.
type outcome struct {
	tiers      []Tier
	ldl        int
	downloaded float64 // the last blob has arrived
	returned   float64 // the last layer is committed: containerd says the image is there
	durable    float64 // and all of it is on its tier, not in the page cache
}

// replay is one pull, event by event: between two events all rates are constant.
//
//   - The link is shared fairly among the downloads that run, at most Concurrent, bottom first. A blob that several layers
//     share is downloaded once.
//   - Sequential unpacking starts a layer when it has arrived and the one below is committed. Parallel unpacking (containerd's
//     max_concurrent_unpacks with the capability rebase) gives its slots out in the order of the layers, and a layer holds its slot from
//     before its download until it is unpacked: so containerd's unpacker does.
//   - Unpacking goes at Unpack bytes/s, and no faster than NVM takes it. A layer for HDD is written into the page cache at
//     Unpack; the disk takes it from there in the background, in order, as soon as it is committed (nhybrid syncs then).
type replay struct {
	o          Options
	policy     Policy
	sequential bool
	layers     []replayed
	now        float64
	slots      int // layers [0, slots) have, or had, an unpack slot
	dirty      float64
	out        outcome
}

type replayed struct {
	ImageLayer
	twin                   int     // lower layer with the same blob, else itself
	left                   float64 // bytes to download
	todo                   float64 // bytes to write
	arrived                float64
	here, storing, written bool
	tier                   Tier
}

func run(img Image, o Options, p Policy, sequential bool) outcome {
	r := &replay{o: o, policy: p, sequential: sequential, slots: 1, out: outcome{ldl: -1}}
	if !sequential {
		r.slots = o.Unpacks
	}
	first := map[string]int{}
	for i, l := range img.Layers {
		twin := i
		if k, ok := first[l.Digest]; ok && l.Digest != "" {
			twin = k
		} else {
			first[l.Digest] = i
		}
		r.layers = append(r.layers, replayed{ImageLayer: l, twin: twin, left: float64(l.Compressed)})
	}
	for r.settle(); r.step(); r.settle() {
	}
	for _, l := range r.layers {
		r.out.tiers = append(r.out.tiers, l.tier)
	}
	return r.out
}

// downloads returns the layers that are being downloaded.
func (r *replay) downloads() []int {
	var out []int
	for i, l := range r.layers {
		if !l.here && l.twin == i {
			if out = append(out, i); len(out) == r.o.Concurrent {
				break
			}
		}
	}
	return out
}

// writeRate returns bytes/s for each layer that is being written to tier t, of which there are n.
func (r *replay) writeRate(t Tier, n int) float64 {
	if t == NVM {
		return min(r.o.Unpack, r.o.NVMWrite/float64(n))
	}
	return r.o.Unpack
}

// step moves to the next event; false if there is none.
func (r *replay) step() bool {
	active := r.downloads()
	var writers [NVM + 1]int
	for _, l := range r.layers {
		if l.storing && !l.written {
			writers[l.tier]++
		}
	}
	link := r.o.Bandwidth / float64(max(len(active), 1))

	dt := math.Inf(1)
	for _, i := range active {
		dt = min(dt, r.layers[i].left/link)
	}
	for _, l := range r.layers {
		if l.storing && !l.written {
			dt = min(dt, l.todo/r.writeRate(l.tier, writers[l.tier]))
		}
	}
	if r.dirty > 0 {
		dt = min(dt, r.dirty/r.o.HDDWrite)
	}
	if math.IsInf(dt, 1) {
		return false
	}

	r.now += dt
	// What ends at this event is set to 0 by comparing quotients, the same that gave dt: differences would leave a rest.
	spend := func(v, rate float64) float64 {
		if v/rate <= dt {
			return 0
		}
		return v - rate*dt
	}
	for _, i := range active {
		r.layers[i].left = spend(r.layers[i].left, link)
	}
	for i := range r.layers {
		if l := &r.layers[i]; l.storing && !l.written {
			l.todo = spend(l.todo, r.writeRate(l.tier, writers[l.tier]))
		}
	}
	if r.dirty > 0 {
		if r.dirty = spend(r.dirty, r.o.HDDWrite); r.dirty == 0 {
			r.out.durable = r.now
		}
	}
	return true
}

// settle does all that happens at this moment: arrivals, ends of writing, and then new starts, which see both.
func (r *replay) settle() {
	for changed := true; changed; {
		changed = r.arrivals()
		changed = r.commits() || changed
		if !changed { // a start may end at once, if the layer is empty
			changed = r.starts()
		}
	}
}

func (r *replay) arrivals() (changed bool) {
	for _, i := range r.downloads() {
		if l := &r.layers[i]; l.left == 0 {
			l.here, l.arrived, changed = true, r.now, true
			if r.out.ldl < 0 || r.now > r.out.downloaded {
				r.out.ldl, r.out.downloaded = i, r.now
			}
		}
	}
	for i := range r.layers {
		if l, t := &r.layers[i], r.layers[r.layers[i].twin]; t.here && !l.here {
			l.here, l.arrived, l.left = true, t.arrived, 0
		}
	}
	return changed
}

func (r *replay) commits() (changed bool) {
	for i := range r.layers {
		l := &r.layers[i]
		if !l.storing || l.written || l.todo > 0 {
			continue
		}
		l.written, changed = true, true
		r.slots++
		r.out.returned = r.now
		if l.tier == HDD {
			r.dirty += float64(l.Uncompressed)
		}
		r.out.durable = max(r.out.durable, r.now) // later, once the disk has it
	}
	return changed
}

// starts begins to store one layer that can be, so that the next sees it storing.
func (r *replay) starts() bool {
	for i := range r.layers[:min(r.slots, len(r.layers))] {
		l := &r.layers[i]
		if l.here && !l.storing {
			l.tier = r.policy.Decide(r.input(i)).Tier
			l.storing, l.todo = true, float64(l.Uncompressed)
			return true
		}
	}
	return false
}

// input is what the daemon would know at this moment: the sizes of blobs that have arrived, the rates that it has measured.
func (r *replay) input(index int) Input {
	in := Input{
		Index: index, Sequential: r.sequential, Concurrency: r.o.Concurrent,
		NVMFree: math.MaxInt64 / 4, HDDBacklog: int64(math.Ceil(r.dirty)),
		HDDRate: r.o.HDDWrite, Bandwidth: r.o.Bandwidth, UnpackRate: r.o.Unpack,
		Layers: make([]Layer, len(r.layers)),
	}
	if r.o.NVMSize > 0 {
		in.NVMFree = r.o.NVMSize
	}
	for i, l := range r.layers {
		v := Layer{Digest: l.Digest, Compressed: l.Compressed, Offset: l.Compressed - int64(math.Ceil(l.left)), Downloaded: l.here,
			Storing: l.storing, Stored: l.written, Tier: l.tier}
		if l.here {
			v.Uncompressed, v.Exact = l.Uncompressed, true
			v.Arrived = time.Unix(0, int64(l.arrived*1e9))
		}
		if l.written && l.tier == NVM {
			in.NVMFree -= Footprint(l.Uncompressed)
		}
		in.Layers[i] = v
	}
	return in
}
