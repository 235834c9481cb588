// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"math/bits"
	"slices"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// first handles the first open of a file through a clone: it belongs to a
// start, or it must be found out to which.
func (t *Tracer) first(c *clone, e *entry, data int, pid int32) {
	if len(c.owners) == 0 {
		c.tries++
		// The first file nearly always tells. Where it does not (a file that
		// the container has renamed) others may, at ever greater distance.
		if bits.OnesCount(uint(c.tries)) == 1 || c.tries < 8 {
			t.resolve(c, e, data, pid)
		}
	}
	for _, w := range c.owners {
		w.touch(t.now())
	}
	if len(c.owners) > 0 || c.foreign {
		return
	}
	// A container may be gone before its first event is read. What nobody's mount
	// tells apart will be shared out at the end of those whose layer it is of; a
	// start that has seen nothing else must come to an end by it.
	for _, w := range t.watches {
		if !w.known && slices.Contains(w.start.Layers, e.layer) {
			w.touch(t.now())
		}
	}
}

// resolve ties a clone to the overlay that made it.
func (t *Tracer) resolve(c *clone, e *entry, data int, pid int32) {
	if o := t.byClone[c.id]; o != nil {
		t.give(c, o)
		return
	}
	visible, err := t.own.overlays()
	if err != nil {
		log.L.WithError(err).Warn("cannot tell which container opens files")
	}
	// The overlays of starts first: there are few. Then the one that the process
	// lives in, which also finds overlays mounted where we cannot see them. Then
	// all others, so that a container that has long been running is known as such.
	for _, o := range visible {
		if t.watched(o) && t.try(c, e, data, o, -1) {
			return
		}
	}
	if o, dir, err := rootOf(pid); err == nil {
		ok := t.try(c, e, data, o, dir)
		unix.Close(dir)
		if ok {
			return
		}
	}
	for _, o := range visible {
		if !t.watched(o) && t.try(c, e, data, o, -1) {
			return
		}
	}
}

func (t *Tracer) watched(o *overlay) bool {
	for _, w := range t.watches {
		if o.wants(w) {
			return true
		}
	}
	return false
}

// try asks whether an overlay made the clone, and remembers the answer. dir is
// its root; -1: it is mounted at a path of ours.
func (t *Tracer) try(c *clone, e *entry, data int, o *overlay, dir int) bool {
	var st unix.Statx_t
	var err error
	if dir < 0 {
		err = unix.Statx(unix.AT_FDCWD, o.point, unix.AT_SYMLINK_NOFOLLOW, statxMask, &st)
	} else {
		err = statx(dir, &st)
	}
	if err != nil || devOf(&st) != o.dev {
		return false // unmounted since, or hidden by another mount
	}
	if known := t.overs[st.Mnt_id]; known != nil {
		o = known
	}
	if o.clones[e.slot()] == 0 {
		id, err := t.probe(o, dir, data, e.path)
		if err != nil {
			log.L.WithError(err).Debug("probe of an overlay failed")
		}
		if id == 0 {
			return false
		}
		if len(t.overs) >= maxOverlays {
			clear(t.overs)
			clear(t.byClone)
		}
		o.clones[e.slot()] = id
		t.overs[st.Mnt_id] = o
		t.byClone[id] = o
	}
	if o.clones[e.slot()] != c.id {
		return false
	}
	t.give(c, o)
	return true
}

// give hands the clone to the starts that the overlay serves.
func (t *Tracer) give(c *clone, o *overlay) {
	for _, w := range t.watches {
		if o.wants(w) {
			c.owners = append(c.owners, w)
			w.known = true
		}
	}
	if len(c.owners) == 0 {
		t.drop(c)
		c.foreign = true
	}
}

func (t *Tracer) drop(c *clone) {
	t.files -= len(c.entries)
	clear(c.entries)
}

func (t *Tracer) forgetForeign() {
	for id, c := range t.mounts {
		if c.foreign {
			delete(t.mounts, id)
		}
	}
}
