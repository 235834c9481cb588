// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import (
	"os"
	"testing"
	"time"
)

// TestRatio measures Persist of one line against the bare instructions, in pairs, so that a busy machine disturbs both. It states a figure and demands none:
// SCM_MEASURE=1 go test -run Ratio -v
func TestRatio(t *testing.T) {
	if os.Getenv("SCM_MEASURE") == "" || Best() != CLWB {
		t.Skip("SCM_MEASURE is not set, or there is no CLWB")
	}
	const size, rounds = 16 << 20, 20000
	m := testMem(t, size)
	best := [2]time.Duration{time.Hour, time.Hour}
	for range 300 {
		t0 := time.Now()
		bareStorePersist(m.Base(), rounds, size/64)
		t1 := time.Now()
		at := uint64(0)
		for i := range rounds {
			*(*uint64)(m.At(at)) = uint64(i)
			if m.Persist(at, 8) != nil {
				t.Fatal("persist")
			}
			if at += 64; at == size {
				at = 0
			}
		}
		t2 := time.Now()
		best[0], best[1] = min(best[0], t1.Sub(t0)), min(best[1], t2.Sub(t1))
	}
	t.Logf("bare %.1f ns, Mem.Persist %.1f ns, ratio %.3f", float64(best[0].Nanoseconds())/rounds, float64(best[1].Nanoseconds())/rounds,
		float64(best[1])/float64(best[0]))
}
