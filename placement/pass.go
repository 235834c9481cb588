// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// pass is one pull that is stored while it downloads, event by event: between two events all rates are constant.
//
//   - The link is shared fairly among the downloads that run, at most Concurrent, bottom first. A blob that several layers share is
//     downloaded and unpacked once. A download keeps its place until containerd has committed the blob, which takes BlobCommit
//     seconds; where blobs stand on the HDD, the disk must first have taken all that was written before the blob's last byte.
//   - At most Unpacks layers are unpacked at a time, bottom first, each from its first byte on, or from its last byte on where the
//     policy is late. One core makes Unpack bytes/s. A layer takes at most one core, all together take Cores, shared fairly.
//   - NVM takes NVMWrite, shared fairly. The disk takes at HDDWrite what is written to packs, and blobs where they stand on it, in the
//     order of writing and beginning at once.
//   - containerd commits layer i once its blob is committed, it is unpacked, and layer i-1 is committed; that takes Commit seconds.
type pass struct {
	o      Options
	policy Policy
	layers []passing
	file   int64 // bytes of a file
	now    float64

	dirty      float64 // bytes that the disk has to take
	taken      int64   // footprint of files on NVM
	hot        float64 // carries the share of hot files from one file to the next
	committed  int     // layers below are committed
	committing bool    // layer [committed] is being committed
	wait       float64 // seconds that its commit still takes
	out        Prediction
}

// passing is one layer of a pass.
type passing struct {
	ImageLayer
	twin  int     // lower layer with the same blob, else itself
	ratio float64 // uncompressed bytes in one compressed byte

	left    float64 // compressed bytes to arrive
	blob    blobState
	sync    float64 // bytes that the disk takes before the blob is on it
	wait    float64 // seconds that the commit of the blob still takes
	arrived float64

	unpacking, unpacked bool
	tier                Tier    // for policies of whole layers
	rest                int64   // uncompressed bytes in files that have not begun
	file                float64 // bytes of the current file that are not unpacked
	place               Place   // of the current file
	hole                bool    // it is one in the pack
	followers           int     // as in FileInput
	nvmBytes            int64   // footprint on NVM
	ready               float64 // uncompressed bytes that could be unpacked; not kept once all have arrived
	rate                float64 // uncompressed bytes/s of unpacking, until the next event
}

type blobState uint8

const (
	blobDownloads blobState = iota
	blobSyncs
	blobCommits
	blobHere
)

const (
	// filesPerPull bounds the files that a pull is made of: a table of layers tells nothing of real ones.
	filesPerPull = 2048
	leastFile    = 64 << 10
)

func newPass(layers []ImageLayer, o Options, p Policy) *pass {
	s := &pass{o: o, policy: p, out: Prediction{LDL: -1}}
	first := map[string]int{}
	for i, l := range layers {
		v := passing{ImageLayer: l, twin: i, left: float64(l.Compressed), rest: l.Uncompressed}
		if l.Compressed > 0 {
			v.ratio = float64(l.Uncompressed) / float64(l.Compressed)
		}
		if k, ok := first[l.Digest]; ok && l.Digest != "" {
			v.twin = k
		} else {
			first[l.Digest] = i
			s.out.Bytes += l.Uncompressed
		}
		s.layers = append(s.layers, v)
	}
	s.file = max(leastFile, s.out.Bytes/filesPerPull)
	return s
}

// downloads returns the layers that hold a place among the downloads.
func (s *pass) downloads() []int {
	var out []int
	for i, l := range s.layers {
		if l.blob != blobHere && l.twin == i {
			if out = append(out, i); len(out) == s.o.Concurrent {
				break
			}
		}
	}
	return out
}

// settle does all that happens at this moment, until nothing changes any more.
func (s *pass) settle() {
	for changed := true; changed; {
		changed = s.blobs()
		changed = s.starts() || changed
		changed = s.files() || changed
		changed = s.commits() || changed
	}
}

// blobs brings blobs that have arrived to the content store.
func (s *pass) blobs() (changed bool) {
	for _, i := range s.downloads() {
		l := &s.layers[i]
		switch {
		case l.blob == blobDownloads && l.left == 0:
			l.blob, l.arrived = blobSyncs, s.now
			if s.o.ContentOnHDD {
				l.sync = s.dirty
			}
			if s.out.LDL < 0 || s.now > s.out.Downloaded {
				s.out.LDL, s.out.Downloaded = i, s.now
			}
		case l.blob == blobSyncs && l.sync == 0:
			l.blob, l.wait = blobCommits, s.o.BlobCommit
		case l.blob == blobCommits && l.wait == 0:
			l.blob = blobHere
		default:
			continue
		}
		changed = true
	}
	return changed
}

// starts gives free unpackers to layers, bottom first.
func (s *pass) starts() (changed bool) {
	free := s.o.Unpacks
	for _, l := range s.layers {
		if l.unpacking && !l.unpacked {
			free--
		}
	}
	active := s.downloads()
	for i := range s.layers {
		l := &s.layers[i]
		if free == 0 {
			break
		}
		if l.unpacking || l.twin != i || l.left > 0 && (s.policy.Late() || !slices.Contains(active, i)) {
			continue
		}
		if !s.policy.ByFile() {
			l.tier = s.policy.Decide(s.input(i)).Tier
		}
		l.unpacking, changed = true, true
		free--
	}
	return changed
}

// files begins the next file of each layer whose last one is unpacked.
func (s *pass) files() (changed bool) {
	for i := range s.layers {
		l := &s.layers[i]
		if !l.unpacking || l.unpacked || l.file > 0 {
			continue
		}
		if l.rest == 0 {
			if l.left == 0 { // before that its digest is not known
				l.unpacked, changed = true, true
			}
			continue
		}
		f := File{Size: min(s.file, l.rest)}
		if s.hot += s.o.Hot; s.hot >= 1 {
			s.hot--
			f.Hot = true
		}
		in := s.fileInput(i)
		in.Hole, in.Followers = l.hole, l.followers
		d := s.policy.PlaceFile(f, in)
		in.After(d)
		l.hole, l.followers = in.Hole, in.Followers
		l.rest -= f.Size
		l.file, l.place = float64(f.Size), d.Place
		s.taken += d.NVMBytes()
		l.nvmBytes += d.NVMBytes()
		if d.Place.OnNVM() {
			s.out.NVMBytes += f.Size
		}
		if d.Place == PlaceNVM {
			s.out.HoleBytes += f.Size
		}
		changed = true
	}
	return changed
}

// commits lets containerd commit the lowest layer that is not committed, once it is there.
func (s *pass) commits() bool {
	if s.committed == len(s.layers) {
		return false
	}
	l := s.layers[s.layers[s.committed].twin]
	switch {
	case !s.committing && l.blob == blobHere && l.unpacked:
		s.committing, s.wait = true, s.o.Commit
	case s.committing && s.wait == 0:
		s.committing, s.out.Returned = false, s.now
		s.committed++
	default:
		return false
	}
	return true
}

// share sets the rates of unpacking: as much as the bytes that are there, a core and NVM allow, and where all together want more than
// the cores make, each at most an equal share.
func (s *pass) share(link float64) {
	var working []*passing
	onNVM := 0
	for i := range s.layers {
		l := &s.layers[i]
		l.rate = 0
		if l.file > 0 {
			working = append(working, l)
			if l.place.OnNVM() {
				onNVM++
			}
		}
	}
	for _, l := range working {
		l.rate = s.o.Unpack
		if l.left > 0 && l.ready == 0 {
			l.rate = min(l.rate, link*l.ratio)
		}
		if l.place.OnNVM() {
			l.rate = min(l.rate, s.o.NVMWrite/float64(onNVM))
		}
	}
	slices.SortStableFunc(working, func(a, b *passing) int { return cmp.Compare(a.rate, b.rate) })
	free := s.o.Cores * s.o.Unpack
	for i, l := range working {
		l.rate = min(l.rate, free/float64(len(working)-i))
		free -= l.rate
	}
}

// step moves to the next event; false if there is none.
func (s *pass) step() bool {
	active := slices.DeleteFunc(s.downloads(), func(i int) bool { return s.layers[i].left == 0 })
	link := s.o.Bandwidth / float64(max(len(active), 1))
	s.share(link)
	gain := make([]float64, len(s.layers)) // of ready
	var inflow float64                     // bytes/s that are written for the disk
	for _, i := range active {
		gain[i] = link*s.layers[i].ratio - s.layers[i].rate
		if s.o.ContentOnHDD {
			inflow += link
		}
	}
	for _, l := range s.layers {
		if l.place.InPack() {
			inflow += l.rate
		}
	}

	// Each thing that is used up ends at an event. The same quotients give dt and tell what ends: differences would leave a rest.
	dt := math.Inf(1)
	s.spend(active, link, inflow, gain, func(v *float64, rate float64) { dt = min(dt, *v/rate) })
	if math.IsInf(dt, 1) {
		return false
	}
	s.now += dt
	if s.dirty > 0 || inflow > 0 {
		s.out.Durable = s.now
	}
	grown := max(inflow-s.o.HDDWrite, 0) * dt
	for _, i := range active {
		s.layers[i].ready += max(gain[i], 0) * dt
	}
	s.spend(active, link, inflow, gain, func(v *float64, rate float64) {
		if *v/rate <= dt {
			*v = 0
		} else {
			*v -= rate * dt
		}
	})
	s.dirty += grown
	return true
}

// spend calls use for all that is being used up, with its rate.
func (s *pass) spend(active []int, link, inflow float64, gain []float64, use func(v *float64, rate float64)) {
	for _, i := range active {
		l := &s.layers[i]
		use(&l.left, link)
		if l.ready > 0 && gain[i] < 0 {
			use(&l.ready, -gain[i])
		}
	}
	for i := range s.layers {
		l := &s.layers[i]
		if l.rate > 0 {
			use(&l.file, l.rate)
		}
		if l.sync > 0 {
			use(&l.sync, s.o.HDDWrite)
		}
		if l.wait > 0 {
			use(&l.wait, 1)
		}
	}
	if s.dirty > 0 && inflow < s.o.HDDWrite {
		use(&s.dirty, s.o.HDDWrite-inflow)
	}
	if s.wait > 0 {
		use(&s.wait, 1)
	}
}

// fileInput is what the daemon knows when it places a file of a layer.
func (s *pass) fileInput(index int) FileInput {
	in := FileInput{Tier: s.layers[index].tier, NVMFree: hugeBytes, NVMInodesFree: -1, HDDRate: s.o.HDDWrite, ContentOnHDD: s.o.ContentOnHDD,
		Bandwidth: s.o.Bandwidth, UnpackRate: s.o.Unpack * min(s.o.Cores, float64(s.o.Unpacks)), Commit: s.o.Commit}
	if s.o.NVMSize > 0 {
		in.NVMFree = s.o.NVMSize - s.taken
	}
	if t := s.o.Taken; t.HDDWrite > 0 {
		in.HDDRate = t.HDDWrite
	}
	if t := s.o.Taken; t.Unpack > 0 {
		in.UnpackRate = t.Unpack
	}
	if t := s.o.Taken; t.Commit > 0 {
		in.Commit = t.Commit * float64(len(s.layers)-s.committed)
	}
	backlog := s.dirty
	var blobs []Progress
	for i, l := range s.layers {
		if l.twin != i {
			continue
		}
		if l.place.InPack() {
			backlog += l.file
		}
		if i != index && l.tier == NVM && l.unpacking && !l.unpacked {
			in.NVMPromised += max(Footprint(l.Uncompressed)-l.nvmBytes, 0)
		}
		p := Progress{Compressed: l.Compressed, Arrived: l.Compressed - int64(math.Ceil(l.left)), Unpacked: l.Uncompressed - l.rest - int64(l.file)}
		if p.Read = p.Arrived; l.ratio > 0 {
			p.Read = int64(float64(p.Unpacked) / l.ratio)
		}
		blobs = append(blobs, p)
	}
	in.Backlog = int64(math.Ceil(backlog))
	in.Left, in.ToUnpack = Rest(blobs)
	return in
}

// input is what the daemon knows when it places a whole layer.
func (s *pass) input(index int) Input {
	in := Input{Index: index, Concurrency: s.o.Concurrent, NVMFree: hugeBytes, HDDBacklog: int64(math.Ceil(s.dirty)), ContentOnHDD: s.o.ContentOnHDD,
		HDDRate: s.o.HDDWrite, Bandwidth: s.o.Bandwidth, UnpackRate: s.o.Unpack, Layers: make([]Layer, len(s.layers))}
	if s.o.NVMSize > 0 {
		in.NVMFree = s.o.NVMSize
	}
	for i := range s.layers {
		l := s.layers[s.layers[i].twin]
		v := Layer{Digest: l.Digest, Compressed: l.Compressed, Offset: l.Compressed - int64(math.Ceil(l.left)), Downloaded: l.blob == blobHere,
			Storing: l.unpacking, Stored: l.unpacked, Tier: l.tier}
		if l.left == 0 {
			v.Uncompressed, v.Exact = l.Uncompressed, true
			v.Arrived = time.Unix(0, int64(l.arrived*1e9))
		}
		if l.unpacked && i == s.layers[i].twin {
			in.NVMFree -= l.nvmBytes
		}
		in.Layers[i] = v
	}
	return in
}
