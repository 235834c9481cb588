// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package plan

// Marks are the watermarks of a space in bytes in use.
func (l Limits) Marks(s Space) (high, low int64) {
	high, low, _ = (&state{Input: Input{Limits: l, Space: s}}).watermarks()
	return high, low
}
