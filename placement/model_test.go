// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"math/rand"
	"testing"

	"github.com/stretchr/testify/assert"
)

// Four layers of 10, 20, 40 and 30 bytes; the LDL is index 1; α = 1 s and β = 0.1 s a byte; T_D = 5 s.
var small = Model{Sizes: []int64{10, 20, 40, 30}, LDL: 1, Download: 5, Alpha: 1, Beta: 0.1}

func TestModelEquations(t *testing.T) {
	for _, tc := range []struct {
		bl                      int
		tDisk, tNVM, total      float64
		uTotal                  int64
		equations, relationToMK string
	}{
		{0, 0, 9, 14, 100, "2, 3, 4 first case; 5; strategy 1: 6", "M < K"},
		{1, 0, 9, 14, 90, "2, 3, 4 first case; 5; strategy 3: 8", "M = K"},
		{2, 20, 7, 32, 70, "2, 3, 4 second case; 5; strategy 2: 7", "M > K"},
		{3, 60, 3, 68, 30, "2, 3, 4 second case; 5", "M > K"},
		{4, 90, 0, 95, 0, "2, 3, 4 second case; 5; all on disk", "M > K"},
	} {
		assert.InDelta(t, tc.tDisk, small.TDisk(tc.bl), 1e-9, "equation 2, M=%d", tc.bl)
		assert.InDelta(t, tc.tNVM, small.TNVM(tc.bl), 1e-9, "equation 3, M=%d", tc.bl)
		assert.InDelta(t, tc.total, small.TTotal(tc.bl), 1e-9, "equations 1 and 4, M=%d", tc.bl)
		assert.Equal(t, tc.uTotal, small.UTotal(tc.bl), "equation 5, M=%d", tc.bl)
	}
	assert.Equal(t, []int{0, 2, 1}, []int{small.Strategy(1), small.Strategy(2), small.Strategy(3)})
}

// TestModelConclusions checks what the paper concludes from the equations, for any image with α > β.
func TestModelConclusions(t *testing.T) {
	r := rand.New(rand.NewSource(2))
	for range 5000 {
		n := 1 + r.Intn(20)
		m := Model{LDL: r.Intn(n), Download: r.Float64() * 100, Beta: r.Float64() * 1e-9}
		m.Alpha = m.Beta * (1 + 20*r.Float64())
		for range n {
			m.Sizes = append(m.Sizes, r.Int63n(1e9))
		}
		b1, b2, b3 := m.Strategy(1), m.Strategy(2), m.Strategy(3)
		eps := 1e-9 * m.TTotal(n)
		assert.InDelta(t, m.TTotal(b1), m.TTotal(b3), eps, "equations 6 and 8: the same T_total")
		assert.LessOrEqual(t, m.UTotal(b3), m.UTotal(b1), "equations 6 and 8: strategy 3 takes no more NVM")
		assert.LessOrEqual(t, m.TTotal(b3), m.TTotal(b2)+eps, "equations 7 and 8: strategy 2 takes no less time")
		for bl := 0; bl <= n; bl++ {
			assert.LessOrEqual(t, m.TTotal(b3), m.TTotal(bl)+eps, "no boundary is earlier than strategy 3")
			assert.InDelta(t, m.Download+m.TDisk(bl)+m.TNVM(bl), m.TTotal(bl), eps, "equation 1")
			// Equation 8 gives the least NVM among the earliest, unless the LDL is empty or the tiers are equally fast.
			if bl > b3 && m.Sizes[m.LDL] > 0 && m.Alpha > m.Beta*1.001 {
				assert.Greater(t, m.TTotal(bl), m.TTotal(b3))
			}
		}
	}
}

func TestModelOutOfRange(t *testing.T) {
	m := Model{Sizes: []int64{1}, LDL: 0, Alpha: 1, Beta: 1}
	assert.Equal(t, int64(0), m.UTotal(9))
	assert.Equal(t, int64(1), m.UTotal(-9))
}
