// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package result

import (
	"math"
	"slices"
)

// Quantile interpolates linearly between the values, as most programs do (type 7 of Hyndman and Fan, 1996). It is NaN
// where there are none.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// Median is the middle value, NaN where there are none.
func Median(values []float64) float64 { return Quantile(values, 0.5) }

// Mean is NaN where there are no values.
func Mean(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}
