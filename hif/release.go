// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import "time"

// release says when containers are asked once more to let go of what has left
// NVM: a file that was open when it left is cached long after it was closed. It
// costs them what else they have cached, so it is done ever less often for what
// is still held, which is mostly open. Of the loop alone.
type release struct {
	held  int64 // bytes, when last asked
	next  time.Time
	pause time.Duration
}

// rarely is how often containers are asked at the least.
const rarely = time.Hour

// due is called now and then with the bytes that are held.
func (r *release) due(held int64, now time.Time) bool {
	before := r.held
	r.held = held
	switch {
	case held == 0:
		return false
	case held > before:
		r.pause, r.next = replan, now.Add(replan)
		return false // who made it leave has just asked
	case now.Before(r.next):
		return false
	}
	r.pause = min(2*r.pause, rarely)
	r.next = now.Add(r.pause)
	return true
}
