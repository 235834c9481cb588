// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

// fits reports whether a clone may be of a start: a mount is of one chain, and what
// is opened through it is of this chain's layers alone. So it is with all clones
// of a container, one for each place of data, which the processes in it tie together.
func (t *Tracer) fits(c *clone, w *Watch) bool {
	if !w.covers(c) {
		return false
	}
	for _, o := range t.mounts {
		if o != c && (c.akin(o) || o.akin(c)) && !w.covers(o) {
			return false
		}
	}
	return true
}

// covers reports whether all that was opened through a clone is of the start's layers.
func (w *Watch) covers(c *clone) bool {
	for l := range c.layers {
		if !w.layers[l] {
			return false
		}
	}
	return true
}

// fitsAlone reports whether a clone that fits a start fits no other that is watched or was when the clone showed up.
func (t *Tracer) fitsAlone(c *clone, w *Watch) bool {
	if c.fitted {
		return false
	}
	for _, o := range t.watches {
		if o != w && t.fits(c, o) {
			return false
		}
	}
	return true
}

// mayBeOf reports whether a clone without a known owner may belong to the start
// that has the clones that are mine. Somebody who looks users up in an image
// executes nothing; whose process executed something through another clone is a
// container: this one, one that is known, or, where the start has executed
// through mounts of its own, one that is not.
func (t *Tracer) mayBeOf(c *clone, mine map[*clone]bool) bool {
	ran, others := false, c.ran
	for o, is := range mine {
		if is && o.ran && c.akin(o) {
			return true
		}
		ran = ran || is && o.ran
	}
	for _, o := range t.mounts {
		if o == c || !o.ran || mine[o] || !c.akin(o) {
			continue
		}
		if o.foreign || len(o.owners) > 0 {
			return false
		}
		others = true
	}
	return !ran || !others
}
