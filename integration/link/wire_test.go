// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var epoch = time.Unix(1000, 0)

func TestWireIsSharedInTheOrderOfReservations(t *testing.T) {
	w := wire{rate: 1000}
	require.Equal(t, epoch.Add(100*time.Millisecond), w.reserve(epoch, 100))
	require.Equal(t, epoch.Add(300*time.Millisecond), w.reserve(epoch, 200), "a second connection queues behind the first")
	later := epoch.Add(time.Hour)
	require.Equal(t, later.Add(time.Second), w.reserve(later, 1000), "an idle hour is not saved up")
	w.setRate(0)
	require.Equal(t, later.Add(time.Second), w.reserve(later, 1<<30), "no limit costs nothing more")
}

func TestFlowCatchesUpWhatItOverslept(t *testing.T) {
	const ms = time.Millisecond
	w := &wire{rate: 1000}
	f := flow{wire: w}
	require.Equal(t, epoch.Add(4*ms), f.send(epoch, 4), "the first chunk is ready when it is sent")
	require.Equal(t, epoch.Add(8*ms), f.send(epoch.Add(7*ms), 4), "3 ms late: as if it had come in time")
	require.Equal(t, epoch.Add(94*ms), f.send(epoch.Add(100*ms), 4), "92 ms late: it catches up 10 of them")
	other := flow{wire: w}
	require.Equal(t, epoch.Add(204*ms), other.send(epoch.Add(200*ms), 4), "a new transfer finds the wire idle and catches up nothing")
}

// simulate lets flows send for a second of a clock that stands still but for its sleepers: each chunk costs its sender some
// time to fetch, and each sleep takes longer than asked. It returns what has passed.
func simulate(rate float64, flows int, fetch, oversleep time.Duration) (total float64) {
	w := &wire{rate: rate}
	type sender struct {
		flow
		awake time.Time
	}
	senders := make([]sender, flows)
	for i := range senders {
		senders[i] = sender{flow{wire: w}, epoch}
	}
	for {
		next := &senders[0]
		for i := range senders {
			if senders[i].awake.Before(next.awake) {
				next = &senders[i]
			}
		}
		now := next.awake.Add(fetch)
		if now.Sub(epoch) > time.Second {
			return total
		}
		due := next.send(now, chunk)
		if next.awake = now; due.After(now) {
			next.awake = due.Add(oversleep)
		}
		if next.awake.Sub(epoch) <= time.Second {
			total += chunk
		}
	}
}

func TestRateIsReachedHoweverLateSleepsEnd(t *testing.T) {
	for _, rate := range []float64{12.5e6, 125e6} {
		for _, flows := range []int{1, 3} {
			for _, oversleep := range []time.Duration{0, 60 * time.Microsecond, 1150 * time.Microsecond, 8 * time.Millisecond} {
				name := fmt.Sprintf("%.1f MB/s, %d connections, %v", rate/1e6, flows, oversleep)
				total := simulate(rate, flows, 20*time.Microsecond, oversleep)
				require.LessOrEqual(t, total, rate, name)
				require.GreaterOrEqual(t, total, 0.98*rate, name)
			}
		}
	}
}

func TestSendersTooSlowForTheWireDoNotBurst(t *testing.T) {
	// Each chunk takes longer to fetch than to send: the sender, not the wire, sets the pace.
	const fetch = 3 * time.Millisecond
	require.InDelta(t, float64(chunk)/fetch.Seconds(), simulate(12.5e6, 1, fetch, 0), 2*chunk)
}
