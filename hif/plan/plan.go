// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package plan decides which files belong on NVM.
//
// [Decide] is a pure function of what is known of images, of what stands where
// and of the space there is; the same input gives the same plan. A plan that
// was carried out, planned again, changes nothing any more, or brings up what
// had to wait for room; it never takes back what it did.
package plan

import (
	"fmt"
	"slices"
	"time"

	"github.com/nhybrid/nhybrid/placement"
)

// Knowledge is what is known of the starts of an image.
type Knowledge int

const (
	Unknown   Knowledge = iota // nothing
	Predicted                  // static analysis
	Traced                     // a profile: of its own starts, inherited, or from a registry
)

// String returns "unknown", "predicted" or "traced".
func (k Knowledge) String() string {
	switch k {
	case Predicted:
		return "predicted"
	case Traced:
		return "traced"
	default:
		return "unknown"
	}
}

// File is a file that starts of an image need.
type File struct {
	Redirect string  // as of pack.Ref, the one name by which it is read
	Size     int64   // bytes
	Weight   float64 // share of the starts that use it, 0 to 1
	Pinned   bool    // the operator wants it on NVM
	OnNVM    bool    // it stands there now
}

// Image is an image on this node.
type Image struct {
	ID        string
	Knowledge Knowledge
	Used      time.Time // its last start; where there was none, when it was pulled
	Hot       []File    // in the order of first use; those of an Unknown image count for nothing
	Layers    []string  // ids
}

// Layer is a layer that stands on this node.
type Layer struct {
	ID string
	// Tier is what its record says: HDD, its home, if all its data stand there
	// durably and what is on NVM is a copy; NVM as long as its place is there.
	Tier placement.Tier
	// Waiting: files of it were stored on NVM alone. They stay until an image that
	// has the layer is traced or room is needed, also once they are copies.
	Waiting bool
	NVM     int64     // bytes that its files occupy on NVM now
	Used    time.Time // when it was stored, or last used in a way that Images do not tell
	Fixed   string    // why it must be left alone for now; "" if it need not
}

// Space is the space on NVM, in bytes.
type Space struct {
	Free, Total int64
	Reserve     int64 // to stay free; what was claimed of a reserve is no longer part of it
	Pinned      int64 // unlinked already, but held by an open file: will be free, is not
}

// Limits are watermarks, as shares of what is not reserved.
type Limits struct {
	High float64 // above this something must leave
	Low  float64 // until this; nothing comes up above it
	// Gain is how many times more than what is there a file must be worth, per
	// byte, to come up in its place; at least 1.
	Gain float64
}

// Disk is what an access of the HDD costs.
type Disk struct {
	Seek time.Duration
	Rate int64 // bytes/s
}

// What stands for a zero value in [Input].
var (
	DefaultLimits = Limits{High: 0.9, Low: 0.8, Gain: 2}
	DefaultDisk   = Disk{Seek: 10 * time.Millisecond, Rate: 150 << 20}
)

// HalfLife is how long an image is not started until it counts half.
const HalfLife = 7 * 24 * time.Hour

// Input is all that a decision depends on.
type Input struct {
	Now    time.Time
	Images []Image
	Layers []Layer
	Space  Space
	Limits Limits
	Disk   Disk
	// Pressing is Pressure of the last plan: what it began goes on until the low watermark.
	Pressing bool
}

// Plan is what the tiers shall look like.
type Plan struct {
	// Down are the layers of which something may have to leave NVM, in the order of work.
	Down []Reduction
	// Up are the files to bring to NVM once Down is done, in the order of work.
	Up []Promotion
	// Floor is how much of NVM, in bytes, must be free after a promotion.
	Floor int64
	// Full tells that NVM is above the high watermark. Pressure: it is, or it was since it was last at the low one and
	// something can still leave.
	Full, Pressure bool
	// Denied are hot files that find no room.
	Denied Sum
	// Freed is what Down is expected to free, Use what is in use afterwards, Up included; bytes.
	Freed, Use int64
}

// Sum is a number of files and their bytes.
type Sum struct {
	Files int
	Bytes int64
}

// Add counts one more file.
func (s *Sum) Add(bytes int64) {
	s.Files++
	s.Bytes += bytes
}

// Reduction leaves of a layer on NVM nothing but some files.
type Reduction struct {
	Layer  string
	AtHome bool            // all its data stand on HDD durably; else they must be brought there first
	Keep   map[string]bool // the redirects that stay
	Freed  int64           // bytes expected to come free
	Leave  []Departure     // hot files among what leaves, least worth last
	Reason string
}

// Departure is a hot file that leaves because of the space.
type Departure struct {
	Redirect string
	Bytes    int64
	Benefit  time.Duration // of a start, expected, see [Promotion]
}

// Promotion is a file that comes up.
type Promotion struct {
	Redirect string
	Size     int64
	// Benefit is the time that it saves, by the starts expected: the sum over
	// images of weight × (seek + size/rate) × how lately the image was started.
	Benefit   time.Duration
	Image     string // the image of which it is hot: the one started last
	Knowledge Knowledge
	Weight    float64
	Pinned    bool
}

// Reason says in one sentence why the file comes up.
func (p Promotion) Reason() string {
	if p.Pinned {
		return fmt.Sprintf("pinned for image %s", p.Image)
	}
	if p.Knowledge == Predicted {
		return fmt.Sprintf("a start of image %s will need it, says its analysis", p.Image)
	}
	return fmt.Sprintf("%.0f %% of the starts of image %s use it", 100*p.Weight, p.Image)
}

// Comes reports whether a file is to come to NVM.
func (p *Plan) Comes(redirect string) bool {
	return slices.ContainsFunc(p.Up, func(u Promotion) bool { return u.Redirect == redirect })
}

// Leaves says, as a clause, why a file of a layer leaves NVM if it stands there; "" if it stays.
func (p *Plan) Leaves(layer, redirect string) string {
	for _, r := range p.Down {
		switch {
		case r.Layer != layer || r.Keep[redirect]:
		case slices.ContainsFunc(r.Leave, func(d Departure) bool { return d.Redirect == redirect }):
			return "NVM is short"
		default:
			return r.Reason
		}
	}
	return ""
}

// Empty tells whether there is nothing to do.
func (p *Plan) Empty() bool { return len(p.Down) == 0 && len(p.Up) == 0 }
