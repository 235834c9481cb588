// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

// Score compares predicted with traced paths, both sets: the share of the predicted that was opened, and the share of
// the opened that was predicted. A share of nothing is 1: who predicts nothing is never wrong.
func Score(predicted, traced []string) (precision, recall float64) {
	truth := make(map[string]bool, len(traced))
	for _, p := range traced {
		truth[p] = true
	}
	guess := make(map[string]bool, len(predicted))
	hits := 0
	for _, p := range predicted {
		if !guess[p] && truth[p] {
			hits++
		}
		guess[p] = true
	}
	share := func(of int) float64 {
		if of == 0 {
			return 1
		}
		return float64(hits) / float64(of)
	}
	return share(len(guess)), share(len(truth))
}
