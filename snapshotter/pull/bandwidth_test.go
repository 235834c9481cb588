// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/nhybrid/nhybrid/placement"
)

func TestBandwidth(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	var b Bandwidth
	assert.Zero(t, b.Rate(), "nothing seen")
	b.Observe(start, 500)
	assert.Zero(t, b.Rate(), "one look tells no rate, and what was there before does not count")
	b.Observe(at(0.01), 1500)
	assert.Zero(t, b.Rate(), "too short a time")
	b.Observe(at(0.01), 9999)
	b.Observe(at(0.005), 9999)
	assert.Zero(t, b.Rate(), "time stands still or goes back: ignored")
	for i := 2; i <= 100; i++ {
		b.Observe(at(float64(i)/100), 500+int64(i)*1000)
	}
	assert.InDelta(t, 100_000, b.Rate(), 1, "steady, and right from the start")

	// Twice as fast from 1 s on: after one half-life half of the way, or nearly, as the past was short; after ten all of it.
	count := int64(100_500)
	for i := 1; i <= 200; i++ {
		count += 2000
		b.Observe(at(1+float64(i)/100), count)
	}
	assert.Greater(t, b.Rate(), 150_000.0)
	assert.Less(t, b.Rate(), 200_000.0)
	for i := 201; i <= 2000; i++ {
		count += 2000
		b.Observe(at(1+float64(i)/100), count)
	}
	assert.InDelta(t, 200_000, b.Rate(), 500)

	// How often one looks does not matter.
	var often, seldom Bandwidth
	for i := 0; i <= 1000; i++ {
		often.Observe(at(float64(i)/100), int64(i)*7)
		if i%100 == 0 {
			seldom.Observe(at(float64(i)/100), int64(i)*7)
		}
	}
	assert.InDelta(t, often.Rate(), seldom.Rate(), 1e-6)

	// A stall fades it out; a counter that begins anew is no negative rate.
	before := b.Rate()
	b.Observe(at(31), count)
	assert.Less(t, b.Rate(), before/4)
	b.Observe(at(32), 0)
	b.Observe(at(33), 1000)
	assert.GreaterOrEqual(t, b.Rate(), 0.0)

	fast := Bandwidth{HalfLife: 100 * time.Millisecond}
	fast.Observe(start, 0)
	fast.Observe(at(1), 1000)
	fast.Observe(at(2), 5000)
	assert.InDelta(t, 4000, fast.Rate(), 10)
}

func TestReceived(t *testing.T) {
	assert.EqualValues(t, 100+7, Received([]placement.Layer{
		{Digest: "a", Compressed: 100, Downloaded: true}, {Digest: "b", Compressed: 50, Offset: 7}, {Digest: "a", Compressed: 100, Downloaded: true},
	}))
}
