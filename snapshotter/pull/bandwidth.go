// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"math"
	"time"

	"github.com/nhybrid/nhybrid/placement"
)

// Bandwidth measures a rate lately, in bytes/s, from a counter that is looked at now and then: of a pull, of unpacking, of a
// disk. What was seen counts half after each HalfLife. The zero value is ready. Not for use by several goroutines at once.
type Bandwidth struct {
	HalfLife time.Duration // 2 s if 0

	at             time.Time
	count          int64
	bytes, seconds float64 // seen, both faded alike, so that their quotient needs no time to settle
}

// leastSeen is how long the counter must have been watched before the rate means anything.
const leastSeen = 0.05 // seconds

// Observe tells the value of the counter at a moment. A counter that fell (another pull, a restart) begins anew from the lower value;
// a moment that is not later than the last one is ignored. Stop observing while nothing is to be done, or the rate fades.
func (b *Bandwidth) Observe(at time.Time, count int64) {
	if b.at.IsZero() || count < b.count {
		b.at, b.count = at, count
		return
	}
	dt := at.Sub(b.at).Seconds()
	if dt <= 0 {
		return
	}
	half := b.HalfLife
	if half <= 0 {
		half = 2 * time.Second
	}
	fade := math.Exp2(-dt / half.Seconds())
	b.bytes = b.bytes*fade + float64(count-b.count)
	b.seconds = b.seconds*fade + dt
	b.at, b.count = at, count
}

// Rate returns bytes/s, 0 while it is unknown.
func (b *Bandwidth) Rate() float64 {
	if b.seconds < leastSeen {
		return 0
	}
	return b.bytes / b.seconds
}

// Received returns the bytes of all layers that have arrived, the counter that Bandwidth wants for a pull. A blob that
// several layers share counts once.
func Received(layers []placement.Layer) int64 {
	var n int64
	seen := make(map[string]bool, len(layers))
	for _, l := range layers {
		if seen[l.Digest] {
			continue
		}
		seen[l.Digest] = true
		if l.Downloaded {
			n += l.Compressed
		} else {
			n += l.Offset
		}
	}
	return n
}
