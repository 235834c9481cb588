// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/placement"
)

// block is the grain in which filesystems give out space.
const block = 4096

// largest is more than any file has, and little enough to be added up.
const largest = 1 << 46

// item is something that is on NVM or could be: a hot file, or what is not hot of a whole layer.
type item struct {
	file  Promotion // of a layer only Redirect is set, to its id
	layer string
	bytes int64
	here  bool // on NVM now
	used  time.Time
	value float64 // benefit in seconds
	stays bool
}

// state is a decision on its way.
type state struct {
	Input
	layers  map[string]Layer
	settled map[string]bool
	used    map[string]time.Time // by layer
	hot     []*item              // in the order of work
	hotHere map[string]int64     // by layer: bytes of hot files on NVM
	cold    map[string]int64     // by layer: bytes of other files on NVM
}

// Decide says which files belong on NVM. Only hot files keep their place of
// layers that are settled (an image that has them is traced) or were stored on
// HDD; other layers stay as they are.
//
// Above the high watermark things leave until the low one: whole layers,
// longest unused first, then hot files by least benefit per byte, pinned ones
// last. Below it hot files come up by most benefit per byte as long as they
// stay under the low watermark; for one that is worth Gain times as much others
// leave, and so do whole layers that have not been used for [HalfLife].
//
// That nothing goes up and down: what stays is filled greedily in an order in
// which all that is on NVM counts Gain times. Carried out, what was taken has
// only moved forward in that order, so what found no room before finds none now.
func Decide(in Input) Plan {
	s := gather(in)
	high, low, usable := s.watermarks()
	use := s.Space.Total - s.Space.Free

	var reduced []string // layers of which only hot files stay in any case
	var items, layers []*item
	for id, l := range s.layers {
		if l.Fixed == "" && s.reduced(l) {
			reduced = append(reduced, id)
			use -= s.cold[id]
		}
	}
	full := max(use-s.Space.Pinned-high, use-usable) > 0
	pressure := full || s.Pressing && use-s.Space.Pinned > low
	movable := func(id string) bool {
		l := s.layers[id]
		return l.Fixed == "" && (s.reduced(l) || pressure || s.stale(id))
	}
	for id, l := range s.layers {
		if movable(id) && !s.reduced(l) && l.NVM > 0 {
			layers = append(layers, &item{file: Promotion{Redirect: id}, layer: id, bytes: s.cold[id], here: true, used: s.used[id]})
		}
	}
	for _, it := range s.hot {
		if it.here && movable(it.layer) || !it.here && s.layers[it.layer].Fixed == "" {
			items = append(items, it)
		}
	}
	base := use
	for _, it := range slices.Concat(items, layers) {
		if it.here {
			base -= it.bytes
		}
	}
	f := filling{gain: s.limits().Gain, room: low - base}
	if pressure {
		// What is pinned is on its way: that it lingers is no reason to drive out
		// more, except out of the reserve. But nothing comes up in its place.
		f.lent = max(0, min(s.Space.Pinned, usable-low))
	}
	s.fill(f, items, layers, pressure)
	leaves := func(it *item) bool { return it.here && !it.stays }
	pressure = full || pressure && (slices.ContainsFunc(items, leaves) || slices.ContainsFunc(layers, leaves))
	p := s.plan(items, layers, reduced, use, low)
	p.Full, p.Pressure = full, pressure
	return p
}

// gather puts the input in order, and leaves out what makes no sense.
func gather(in Input) *state {
	s := &state{Input: in, layers: map[string]Layer{}, settled: map[string]bool{}, used: map[string]time.Time{}, hotHere: map[string]int64{}, cold: map[string]int64{}}
	for _, l := range in.Layers {
		s.layers[l.ID], s.used[l.ID] = l, l.Used
	}
	images := slices.SortedFunc(slices.Values(in.Images), func(a, b Image) int {
		return cmp.Or(b.Used.Compare(a.Used), cmp.Compare(a.ID, b.ID))
	})
	byName := map[string]*item{}
	for _, im := range images {
		for _, id := range im.Layers {
			s.settled[id] = s.settled[id] || im.Knowledge == Traced
			if im.Used.After(s.used[id]) {
				s.used[id] = im.Used
			}
		}
		if im.Knowledge == Unknown {
			continue
		}
		for _, f := range im.Hot {
			id := layerOf(f.Redirect)
			if _, ok := s.layers[id]; !ok || f.Size <= 0 || f.Size > largest {
				continue
			}
			it := byName[f.Redirect]
			if it == nil {
				it = &item{layer: id, bytes: (f.Size + block - 1) / block * block,
					file: Promotion{Redirect: f.Redirect, Size: f.Size, Image: im.ID, Knowledge: im.Knowledge, Weight: f.Weight}}
				byName[f.Redirect] = it
				s.hot = append(s.hot, it)
			}
			it.here = it.here || f.OnNVM
			it.file.Pinned = it.file.Pinned || f.Pinned
			it.value += s.benefit(f, im.Used)
		}
	}
	for _, it := range s.hot {
		it.file.Benefit = time.Duration(it.value * float64(time.Second))
		if it.here {
			s.hotHere[it.layer] += it.bytes
		}
	}
	for id, l := range s.layers {
		s.cold[id] = max(0, l.NVM-s.hotHere[id])
	}
	return s
}

// benefit is the time, in seconds, that a file on NVM saves of a start, by how
// often it is used and how lately its image was started.
func (s *state) benefit(f File, used time.Time) float64 {
	disk := s.Disk
	if disk.Seek <= 0 {
		disk.Seek = DefaultDisk.Seek
	}
	if disk.Rate <= 0 {
		disk.Rate = DefaultDisk.Rate
	}
	weight := f.Weight
	if !(weight > 0) { // not a number, too
		return 0
	}
	age := max(0, s.Now.Sub(used))
	return min(weight, 1) * math.Exp2(-float64(age)/float64(HalfLife)) * (disk.Seek.Seconds() + float64(f.Size)/float64(disk.Rate))
}

// reduced tells whether only hot files of a layer stay in any case.
func (s *state) reduced(l Layer) bool {
	return s.settled[l.ID] || l.Tier == placement.HDD && (!l.Waiting || s.cold[l.ID] == 0)
}

func (s *state) stale(id string) bool { return s.Now.Sub(s.used[id]) > HalfLife }

func (s *state) watermarks() (high, low, usable int64) {
	usable = max(0, s.Space.Total-s.Space.Reserve)
	limits := s.limits()
	high = int64(limits.High * float64(usable))
	return high, min(high, int64(limits.Low*float64(usable))), usable
}

func (s *state) limits() Limits {
	or := func(v, otherwise float64) float64 {
		if v > 0 {
			return v
		}
		return otherwise
	}
	return Limits{
		High: min(1, or(s.Limits.High, DefaultLimits.High)),
		Low:  min(1, or(s.Limits.Low, DefaultLimits.Low)),
		Gain: max(1, or(s.Limits.Gain, DefaultLimits.Gain)),
	}
}

// filling is the room that there is, in bytes, and what gets some of it.
type filling struct {
	gain      float64
	room      int64 // can be negative
	lent      int64 // more room for what is on NVM already
	displaced bool  // something had to leave
	comes     bool  // something comes up
}

// fill marks what stays or comes up.
func (s *state) fill(f filling, items, layers []*item, pressure bool) {
	slices.SortFunc(layers, func(a, b *item) int { return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.layer, b.layer)) })
	fresh := slices.IndexFunc(layers, func(it *item) bool { return s.stale(it.layer) })
	if fresh < 0 {
		fresh = len(layers)
	}
	if fresh > 0 {
		// Layers that wait for their first start leave under pressure only, before
		// hot files that are there, but not for others that would like to be.
		try := f
		try.hot(slices.DeleteFunc(slices.Clone(items), func(it *item) bool { return !it.here && !it.file.Pinned }))
		try.layers(layers[:fresh])
		kept := map[string]bool{}
		for _, it := range layers[:fresh] {
			if kept[it.layer] = it.stays; it.stays {
				f.room -= it.bytes
			} else {
				f.displaced = true
			}
		}
		left := f.displaced
		f.displaced = false
		items = slices.DeleteFunc(slices.Clone(items), func(it *item) bool {
			if !kept[it.layer] {
				return false
			}
			if it.stays = it.here; it.here { // part of its layer
				f.room -= it.bytes
			}
			return true
		})
		f.hot(items)
		f.displaced = f.displaced || left
	} else {
		f.hot(items)
	}
	f.layers(layers[fresh:])
	if f.comes || pressure {
		return
	}
	// Nothing is worth the room: what is above the low watermark may stay there.
	for _, it := range slices.Concat(items, layers) {
		it.stays = it.here
	}
}

// hot gives room to files, by benefit per byte, pinned ones first.
func (f *filling) hot(items []*item) {
	worth := func(it *item) float64 {
		w := it.value / float64(it.bytes)
		if it.here {
			w *= f.gain
		}
		return w
	}
	order := slices.Clone(items)
	slices.SortFunc(order, func(a, b *item) int {
		return cmp.Or(first(a.file.Pinned, b.file.Pinned), cmp.Compare(worth(b), worth(a)), first(a.here, b.here), cmp.Compare(a.file.Redirect, b.file.Redirect))
	})
	for _, it := range order {
		it.stays = it.bytes <= f.room || it.here && it.bytes <= f.room+f.lent
		switch {
		case it.stays:
			f.room -= it.bytes
			// What would only fill the gap that something of more worth leaves is
			// no reason for that to leave.
			f.comes = f.comes || !it.here && !f.displaced
		case it.here:
			f.displaced = true
		}
	}
}

// layers gives room to whole layers, in their order: all leave before any hot
// file, and the one used longer ago does not stay in the gap of another.
func (f *filling) layers(layers []*item) {
	for _, it := range layers {
		if it.stays = !f.displaced && it.bytes <= f.room+f.lent; it.stays {
			f.room -= it.bytes
		} else {
			f.displaced = true
		}
	}
}

func first(a, b bool) int {
	switch {
	case a && !b:
		return -1
	case b && !a:
		return 1
	}
	return 0
}

func (s *state) plan(items, layers []*item, reduced []string, use, low int64) Plan {
	p := Plan{Floor: s.Space.Total - low, Use: use}
	down := map[string]*Reduction{}
	for _, id := range reduced {
		l := s.layers[id]
		if l.NVM == 0 && l.Tier == placement.HDD && s.hotHere[id] == 0 {
			continue
		}
		down[id] = &Reduction{Freed: s.cold[id], Reason: "an image that has the layer was traced, so only its hot files stay"}
		if !s.settled[id] {
			down[id].Reason = "the layer was stored on HDD, so only hot files stay"
		}
	}
	for _, it := range layers {
		if !it.stays {
			p.Use -= it.bytes
			down[it.layer] = &Reduction{Freed: it.bytes, Reason: fmt.Sprintf("nobody has used the layer since %s, and NVM is short", it.used.UTC().Format(time.DateTime))}
		}
	}
	for _, it := range items {
		switch {
		case it.stays && !it.here:
			p.Use += it.bytes
			p.Up = append(p.Up, it.file)
		case !it.stays && it.here:
			r := down[it.layer]
			p.Use -= it.bytes
			r.Freed += it.bytes
			r.Leave = append(r.Leave, Departure{it.file.Redirect, it.bytes, it.file.Benefit})
			fallthrough
		case !it.stays:
			p.Denied.Add(it.file.Size)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(down)) {
		r := down[id]
		r.Layer, r.AtHome, r.Keep = id, s.layers[id].Tier == placement.HDD, map[string]bool{}
		slices.SortStableFunc(r.Leave, func(a, b Departure) int {
			return cmp.Compare(float64(b.Benefit)/float64(b.Bytes), float64(a.Benefit)/float64(a.Bytes))
		})
		p.Freed += r.Freed
		p.Down = append(p.Down, *r)
	}
	index := map[string]int{}
	for i := range p.Down {
		index[p.Down[i].Layer] = i
	}
	for _, it := range s.hot {
		if i, ok := index[it.layer]; ok && it.stays {
			p.Down[i].Keep[it.file.Redirect] = true
		}
	}
	// What frees space at once comes first, and most of it.
	slices.SortStableFunc(p.Down, func(a, b Reduction) int {
		if a.AtHome != b.AtHome {
			if a.AtHome {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.Freed, a.Freed)
	})
	return p
}

func layerOf(redirect string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(redirect, "/"), "/")
	return id
}
