// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import "slices"

// Files is how many files the start has opened so far, those left out whose
// mount is not tied to a container yet.
func (w *Watch) Files() (n int) {
	w.t.mu.Lock()
	defer w.t.mu.Unlock()
	for _, c := range w.t.mounts {
		if slices.Contains(c.owners, w) {
			n += len(c.entries)
		}
	}
	return n
}
