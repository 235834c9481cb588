// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package placement decides on which tier the data of an image is stored: of whole layers, or of each file while its bytes arrive.
// It imports nothing of the project.
//
// Everything here is a pure function of values: no I/O, no clocks, no state. The daemon and the simulators call the same [Policy]. All
// types are plain values; nothing here is safe for concurrent change, all of it is for concurrent reading.
package placement

import (
	"fmt"
	"time"
)

// Tier is one of the two places where the bytes of a layer can be.
type Tier uint8

const (
	HDD Tier = iota // the large slow tier, the home of all data
	NVM             // the small fast tier
)

// String returns "hdd" or "nvm".
func (t Tier) String() string {
	switch t {
	case HDD:
		return "hdd"
	case NVM:
		return "nvm"
	}
	return fmt.Sprintf("tier(%d)", uint8(t))
}

// MarshalText implements encoding.TextMarshaler.
func (t Tier) MarshalText() ([]byte, error) {
	if t > NVM {
		return nil, fmt.Errorf("unknown tier %d", uint8(t))
	}
	return []byte(t.String()), nil
}

// UnmarshalText accepts what MarshalText writes.
func (t *Tier) UnmarshalText(b []byte) error {
	switch string(b) {
	case "hdd":
		*t = HDD
	case "nvm":
		*t = NVM
	default:
		return fmt.Errorf("unknown tier %q: want nvm or hdd", b)
	}
	return nil
}

// Layer is what is known of one layer of an image at the moment of a decision.
type Layer struct {
	Digest       string `json:"digest"`       // of the blob, as the manifest names it
	Compressed   int64  `json:"compressed"`   // bytes of the blob, from the manifest
	Uncompressed int64  `json:"uncompressed"` // bytes of the tar inside; 0 if unknown
	Exact        bool   `json:"exact"`        // Uncompressed was read from the blob, not estimated
	Offset       int64  `json:"offset"`       // bytes downloaded so far
	Downloaded   bool   `json:"downloaded"`   // the whole blob has arrived
	// Arrived is when the blob had arrived, if it did during this pull; zero for a blob that was there before. Only the
	// order of these times is looked at, to name the layer that was downloaded last.
	Arrived time.Time `json:"arrived,omitzero"`
	Storing bool      `json:"storing"` // writing it to Tier has started
	// Stored: it is committed, by this pull or an earlier one. containerd never downloads a layer whose snapshot it has, so
	// Stored counts as arrived even without Downloaded.
	Stored bool `json:"stored"`
	Tier   Tier `json:"tier"` // meaningful once Storing or Stored
}

// Size returns the uncompressed size in bytes, or a cautious estimate where it is unknown.
func (l Layer) Size() int64 {
	if l.Uncompressed > 0 || l.Exact {
		return max(l.Uncompressed, 0)
	}
	return EstimateUncompressed(l.Compressed)
}

// least returns a lower bound of the uncompressed size: an estimate is made to be too large, so it is no such bound, but
// nobody ships a layer that compression made larger by more than a few bytes.
func (l Layer) least() int64 {
	if l.Exact {
		return max(l.Uncompressed, 0)
	}
	return max(l.Compressed, 0)
}

// Input is everything a decision may look at.
type Input struct {
	Index  int     `json:"index"`  // the layer to be placed
	Layers []Layer `json:"layers"` // of the image, bottom first

	NVMFree     int64 `json:"nvm_free"`     // bytes free on NVM
	NVMReserve  int64 `json:"nvm_reserve"`  // bytes of it that are never taken
	NVMPromised int64 `json:"nvm_promised"` // bytes of it that layers of other images, being stored now, will take

	HDDBacklog int64 `json:"hdd_backlog"` // bytes written to the HDD tier and not yet on the disk
	// ContentOnHDD: containerd keeps the blobs on the same disk, which so has to take what still downloads too.
	ContentOnHDD bool    `json:"content_on_hdd"`
	HDDRate      float64 `json:"hdd_rate"`    // bytes/s at which the HDD takes them, lately measured; 0 unknown
	Bandwidth    float64 `json:"bandwidth"`   // bytes/s of this pull, lately measured; 0 unknown
	UnpackRate   float64 `json:"unpack_rate"` // uncompressed bytes/s at which a layer is unpacked; 0 unknown
	Concurrency  int     `json:"concurrency"` // downloads at a time; 0 no limit
	Sequential   bool    `json:"sequential"`  // layer i is unpacked after i-1 was committed
}

// here tells whether layer i need not be waited for any more.
func (in Input) here(i int) bool {
	l := in.Layers[i]
	// In sequence all layers below have been committed before this one can be asked for.
	// A blob of which all bytes have come no longer uses the link; containerd is bringing it to the disk.
	return l.Downloaded || l.Storing || l.Stored || (in.Sequential && i < in.Index) || (l.Compressed > 0 && l.Offset >= l.Compressed)
}

// left returns the bytes that have not arrived yet, by layer. A blob that several layers share is downloaded once, and counted at
// the lowest of them.
func (in Input) left() []int64 {
	out := make([]int64, len(in.Layers))
	seen := make(map[string]bool, len(in.Layers))
	for i, l := range in.Layers {
		if in.here(i) || (l.Digest != "" && seen[l.Digest]) {
			continue
		}
		seen[l.Digest] = true
		out[i] = max(min(l.Compressed, hugeBytes)-max(l.Offset, 0), 0)
	}
	return out
}

// Downloading returns how many layers but the one in question are still on their way, and the bytes that they lack.
func (in Input) Downloading() (n int, left int64) {
	for i, b := range in.left() {
		if i != in.Index && !in.here(i) {
			n++
			left = min(left+b, hugeBytes)
		}
	}
	return n, left
}

// Decision is the answer of a policy.
type Decision struct {
	Tier     Tier   `json:"tier"`
	Policy   string `json:"policy"`
	LDL      int    `json:"ldl"`      // index of the last-downloading layer, known or estimated; -1 if nothing was downloaded
	Admitted bool   `json:"admitted"` // false: the policy wanted NVM and there was no room
	Reason   string `json:"reason"`   // one sentence for a person
	Input    Input  `json:"input"`    // what the decision rested on; its Layers are not copied
	// Files is where the files of the layer went, if the policy decided by the file; see Summary.Decision.
	Files *Summary `json:"files,omitempty"`
}

// EstimateUncompressed returns a cautious guess of the uncompressed size of a layer whose blob has not arrived, in bytes.
//
// Of the 243 layers of 100 kB and more in testdata/hub-2018-layers.csv whose uncompressed size is known, the median ratio is
// 2.4, 99 % lie below 4.3 and the largest is 4.42. Small blobs go higher, since tar pads each entry and the archive to
// 10 KiB; the constant covers that. Too high a guess costs at most a layer that goes to HDD when NVM is nearly full; it is
// replaced by the real size as soon as the blob is there.
func EstimateUncompressed(compressed int64) int64 {
	if compressed <= 0 {
		return 0
	}
	if compressed > hugeBytes/5 {
		return hugeBytes
	}
	return compressed*9/2 + 16<<10
}

// Footprint returns the bytes that a layer of the given uncompressed size may take on a filesystem with 4 KiB blocks.
// Debian's /usr/share (43 000 files, 13 kB on average) takes 1.16 times its tar, its Python library 1.13, its shared
// libraries 1.01; a quarter on top, and 1 MiB for the directories of a tiny layer, stays above all of them.
func Footprint(uncompressed int64) int64 {
	uncompressed = min(max(uncompressed, 0), hugeBytes)
	return uncompressed + uncompressed/4 + 1<<20
}

// LDL returns the index of the last-downloading layer. While layers are downloading it is the one that is expected to
// finish last when the link is shared fairly among the in.Concurrency lowest unfinished layers. When all have arrived it is the
// one that came last during this pull, and -1 if all were there before it. At a tie the lower index is returned.
func LDL(in Input) int {
	pending := false
	for i := range in.Layers {
		pending = pending || !in.here(i)
	}
	if !pending {
		last := -1
		for i, l := range in.Layers {
			if l.Compressed > 0 && l.Offset >= l.Compressed && !l.Downloaded && !l.Storing && !l.Stored {
				return i // all its bytes have come but containerd has not closed it yet, as it has the others
			}
			if !l.Arrived.IsZero() && (last < 0 || l.Arrived.After(in.Layers[last].Arrived)) {
				last = i
			}
		}
		return last
	}
	return lastOfFairShare(in.left(), func(i int) bool { return !in.here(i) }, in.Concurrency)
}

// lastOfFairShare returns which of the waiting layers finishes last if the first n unfinished ones always get equal shares.
// rest is what each lacks; it is used up.
func lastOfFairShare(rest []int64, waiting func(int) bool, n int) int {
	var queue []int
	for i := range rest {
		if waiting(i) {
			queue = append(queue, i)
		}
	}
	if n <= 0 {
		n = len(queue)
	}
	last := -1
	for len(queue) > 0 {
		active := queue[:min(n, len(queue))]
		least := rest[active[0]]
		for _, i := range active {
			least = min(least, rest[i])
		}
		last = -1
		keep := make([]int, 0, len(queue))
		for k, i := range queue {
			if k < len(active) {
				rest[i] -= least
				if rest[i] == 0 {
					if last < 0 {
						last = i
					}
					continue
				}
			}
			keep = append(keep, i)
		}
		queue = keep
	}
	return last
}
