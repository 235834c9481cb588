// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import "fmt"

// Place is where the unpacker writes the data of one file.
type Place uint8

const (
	PlacePack Place = iota // into the layer's pack on HDD
	PlaceNVM               // onto NVM alone: the pack has a hole, which is filled later
	PlaceBoth              // onto NVM and into the pack
)

// places are the names of the places, by their values.
var places = [...]string{PlacePack: "pack", PlaceNVM: "nvm", PlaceBoth: "both"}

// String returns "pack", "nvm" or "both".
func (p Place) String() string {
	if int(p) < len(places) {
		return places[p]
	}
	return fmt.Sprintf("place(%d)", uint8(p))
}

// OnNVM reports whether the data is written to NVM.
func (p Place) OnNVM() bool { return p == PlaceNVM || p == PlaceBoth }

// InPack reports whether the data is written into the pack.
func (p Place) InPack() bool { return p == PlacePack || p == PlaceBoth }

// MarshalText implements encoding.TextMarshaler.
func (p Place) MarshalText() ([]byte, error) {
	if int(p) >= len(places) {
		return nil, fmt.Errorf("unknown place %d", uint8(p))
	}
	return []byte(places[p]), nil
}

// UnmarshalText accepts what MarshalText writes.
func (p *Place) UnmarshalText(b []byte) error {
	for i, name := range places {
		if name == string(b) {
			*p = Place(i)
			return nil
		}
	}
	return fmt.Errorf("unknown place %q: want pack, nvm or both", b)
}

// File is what is known of one data file when its header has been read from the tar and its bytes are about to come.
type File struct {
	Path string `json:"path"` // in the layer
	Size int64  `json:"size"` // bytes of data
	Hot  bool   `json:"hot"`  // a start of the image is expected to read it
	// HotBy is where that is known from: "profile", "inherited" or "static analysis"; "" if it is not hot.
	HotBy string `json:"hot_by,omitempty"`
}

// FileInput is the state of a pull and of the two tiers at the moment a file is placed. A rate of 0 is unknown.
type FileInput struct {
	// Tier is that of the layer's Decision. Policies that place whole layers follow it; the others do not look at it.
	Tier Tier `json:"tier"`

	// Hole says that the file before this one in the pack is a hole, Followers how many files below LeastLate went there since the last
	// larger one.
	Hole      bool `json:"hole,omitempty"`
	Followers int  `json:"followers,omitempty"`

	NVMFree    int64 `json:"nvm_free"`    // bytes free on NVM
	NVMReserve int64 `json:"nvm_reserve"` // bytes of it that are never taken
	// NVMPromised is bytes of it that are promised and not written yet, but for what a policy for whole layers promised to this layer.
	NVMPromised   int64 `json:"nvm_promised"`
	NVMInodesFree int64 `json:"nvm_inodes_free"` // inodes of NVM that may be taken, the reserve not among them; negative if its filesystem has no limit

	// Backlog is the bytes that are written and not yet on the disk of the HDD tier. Where containerd's blobs stand on that disk,
	// their bytes count too.
	Backlog int64   `json:"backlog"`
	HDDRate float64 `json:"hdd_rate"` // bytes/s at which the disk takes packs, lately measured
	// ContentOnHDD: containerd writes its blobs to the same disk, which so has to take Left as well.
	ContentOnHDD bool `json:"content_on_hdd"`

	Left      int64   `json:"left"`      // compressed bytes of the pull still to arrive, those of this layer included
	Bandwidth float64 `json:"bandwidth"` // bytes/s of the pull, lately measured
	// ToUnpack is a lower bound of the uncompressed bytes of the pull still to be unpacked, this file included; see Rest.
	ToUnpack int64 `json:"to_unpack"`
	// UnpackRate is uncompressed bytes/s of all unpackers of the pull together while they do not wait for the link.
	UnpackRate float64 `json:"unpack_rate"`
	// Commit is the least time in seconds from the last unpacked byte until containerd says that the image is there.
	Commit float64 `json:"commit"`
}

// Rule is what a FileDecision rests on.
type Rule string

const (
	RuleHot     Rule = "hot"      // the file is hot and NVM has room
	RuleInTime  Rule = "in-time"  // the disk has the file before the pull can end
	RuleLate    Rule = "late"     // the disk would have it later, and NVM has room
	RuleSmall   Rule = "small"    // the disk would have it later, but the file costs more on NVM than it spares the disk
	RuleNoRoom  Rule = "no-room"  // NVM is wanted and has no room in bytes
	RuleNoInode Rule = "no-inode" // NVM is wanted and has too few inodes
	RuleUnknown Rule = "unknown"  // a rate is not known yet, so the file goes to the pack
	RuleLayer   Rule = "layer"    // the file goes where its whole layer goes
)

// FileDecision is the answer of Policy.PlaceFile. Its sentence is made only when Reason is called, because a layer may have a
// million files.
type FileDecision struct {
	Place  Place     `json:"place"`
	Rule   Rule      `json:"rule"`
	Policy string    `json:"policy"`
	File   File      `json:"file"`
	Input  FileInput `json:"input"`
}

// NVMBytes returns the bytes of NVM that the decision may take, to be promised until the file is written.
func (d FileDecision) NVMBytes() int64 {
	if d.Place.OnNVM() {
		return FileFootprint(d.File.Size)
	}
	return 0
}

const (
	// LeastLate is the size in bytes from which a file goes to NVM because the disk would have it late. To make a file on NVM, fill its
	// hole and unlink it again takes some 150 µs of CPU, an inode and a block of 4 KiB; a disk of 140 MB/s takes 16 KiB in 117 µs. In
	// Debian's /usr 86 % of the files are smaller, with 6 % of the bytes.
	LeastLate = 16 << 10
	// MostFollowers is how many smaller files follow a larger one to NVM. In the pack, the disk would have to pass its hole for the first
	// of them, in 4 ms or so, which is what NVM costs for that many.
	MostFollowers = 32
)

const (
	block = 4096
	// newDirs is the directories that a file on NVM may need before it: that of the layer and that of the low bits of its number.
	newDirs = 2
	// hugeBytes is above every size of a file or a device, and keeps sums of a few of them below 2^63.
	hugeBytes = 1 << 60
)

// FileFootprint returns the bytes that a data file of the given size may take on NVM: whole blocks of 4 KiB, and 1/256 of the size
// for blocks of extents on a fragmented filesystem. Directories are not in it.
func FileFootprint(size int64) int64 {
	size = min(max(size, 0), hugeBytes)
	return (size+block-1)/block*block + size/256
}

// room returns the bytes of NVM that may be taken.
func (in FileInput) room() int64 { return available(in.NVMFree, in.NVMReserve, in.NVMPromised) }

// available returns free less what is taken, and 0 where more is taken than free. No sum overflows.
func available(free int64, taken ...int64) int64 {
	free = max(free, 0)
	for _, n := range taken {
		free -= min(max(n, 0), free)
	}
	return free
}

// needs returns the bytes that NVM must have for a file and the directories that it may be the first in.
func (FileInput) needs(size int64) int64 { return FileFootprint(size) + newDirs*block }

// fits reports whether NVM has room for a file.
func (in FileInput) fits(size int64) bool {
	return in.needs(size) <= in.room() && (in.NVMInodesFree < 0 || in.NVMInodesFree >= 1+newDirs)
}

// shortage says by which rule NVM does not take a file that does not fit.
func (in FileInput) shortage(size int64) Rule {
	if in.needs(size) > in.room() {
		return RuleNoRoom
	}
	return RuleNoInode
}

// disk returns the seconds until the disk has all that it must take, a file of the given size included.
func (in FileInput) disk(size int64) float64 { return float64(in.queue(size)) / in.HDDRate }

// queue returns the bytes that the disk must take until it has a file of the given size.
func (in FileInput) queue(size int64) int64 {
	b := min(max(in.Backlog, 0), hugeBytes) + min(max(size, 0), hugeBytes)
	if in.ContentOnHDD {
		b += min(max(in.Left, 0), hugeBytes)
	}
	return b
}

// rest returns the least time in seconds until the pull can end: T. A term whose rate is unknown counts 0.
func (in FileInput) rest() float64 {
	var t float64
	if in.Left > 0 && in.Bandwidth > 0 {
		t = float64(in.Left) / in.Bandwidth
	}
	if in.ToUnpack > 0 && in.UnpackRate > 0 {
		t = max(t, float64(in.ToUnpack)/in.UnpackRate)
	}
	return t + max(in.Commit, 0)
}

// unknown names the rate without which the deadline rule cannot say that the disk is late; "" if none is missing.
func (in FileInput) unknown() string {
	switch {
	case !(in.HDDRate > 0):
		return "the rate of the HDD"
	case in.Left > 0 && !(in.Bandwidth > 0):
		return "the bandwidth"
	case in.ToUnpack > 0 && !(in.UnpackRate > 0):
		return "the rate of unpacking"
	}
	return ""
}

// inTime reports whether the disk has a file of the given size before the pull can end.
func (in FileInput) inTime(size int64) bool {
	return in.HDDRate > 0 && in.disk(size) <= in.rest()
}

// byFile is the rule of drain for one file. Two questions decide, one for each tier:
//
//	NVM    is the file hot, or would the disk be late with it? Then NVM takes it if it has room.
//	pack   does the disk have it before the pull can end, (B + size)/R <= T, or does NVM not take it? Then the pack takes it.
//
// So a hot file that the disk takes in time stands on NVM and needs no filling later. Files below [LeastLate] are late only where they
// would stand behind a hole: a layer of small files stays in its pack. Without the rates the disk counts as in time: a pull neither
// fails nor waits for lack of knowledge.
func byFile(f File, in FileInput) (Place, Rule) {
	late := !in.inTime(f.Size)
	blind := late && in.unknown() != "" // it may be in time all the same
	late = late && !blind
	small := late && f.Size < LeastLate && (!in.Hole || in.Followers >= MostFollowers)
	late = late && !small
	switch wanted := f.Hot || late; {
	case blind && !wanted:
		return PlacePack, RuleUnknown
	case small && !wanted:
		return PlacePack, RuleSmall
	case !wanted:
		return PlacePack, RuleInTime
	case !in.fits(f.Size):
		return PlacePack, in.shortage(f.Size)
	case !f.Hot:
		return PlaceNVM, RuleLate
	case late:
		return PlaceNVM, RuleHot
	default:
		return PlaceBoth, RuleHot
	}
}

// byLayer puts a file where its layer goes. A layer on NVM whose files turn out larger than what was promised goes on in the pack.
func byLayer(f File, in FileInput) (Place, Rule) {
	switch {
	case in.Tier != NVM:
		return PlacePack, RuleLayer
	case !in.fits(f.Size):
		return PlacePack, in.shortage(f.Size)
	default:
		return PlaceNVM, RuleLayer
	}
}

// After updates Hole and Followers by a decision, for the next file of the same layer.
func (in *FileInput) After(d FileDecision) {
	switch in.Hole = d.Place == PlaceNVM; {
	case !in.Hole || d.File.Size >= LeastLate:
		in.Followers = 0
	default:
		in.Followers++
	}
}

func (p policy) PlaceFile(f File, in FileInput) FileDecision {
	d := FileDecision{Policy: p.name, File: f, Input: in}
	if p.byFile {
		d.Place, d.Rule = byFile(f, in)
	} else {
		d.Place, d.Rule = byLayer(f, in)
	}
	return d
}
