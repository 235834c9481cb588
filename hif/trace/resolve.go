// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"math/bits"
	"slices"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
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
		if !w.known && w.layers[e.ref.Layer] {
			w.touch(t.now())
		}
	}
}

// resolve ties a clone to the overlay that made it. pids are of processes that
// may live in that overlay. The caller holds resolving and mu, which is given up
// while the kernel is asked.
func (t *Tracer) resolve(c *clone, e *entry, data int, pids ...int32) {
	if o := t.byClone[c.id]; o != nil {
		t.give(c, o)
		return
	}
	var visible []*overlay
	t.unlocked(func() {
		var err error
		if visible, err = t.own.overlays(); err != nil {
			log.L.WithError(err).Warn("cannot tell which container opens files")
		}
	})
	// The overlays of starts first: there are few. Then the one that the process
	// lives in, which also finds overlays mounted where we cannot see them. Then
	// all others, so that a container that has long been running is known as such.
	for _, o := range visible {
		if t.watched(o) && t.try(c, e, data, o, -1) {
			return
		}
	}
	for _, pid := range pids {
		var o *overlay
		var dir int
		var err error
		t.unlocked(func() { o, dir, err = rootOf(pid) })
		if err == nil {
			ok := t.try(c, e, data, o, dir)
			unix.Close(dir)
			if ok {
				return
			}
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
	t.unlocked(func() {
		if dir < 0 {
			err = unix.Statx(unix.AT_FDCWD, o.point, unix.AT_SYMLINK_NOFOLLOW, statxMask, &st)
		} else {
			err = statx(dir, &st)
		}
	})
	if err != nil || devOf(&st) != o.dev {
		return false // unmounted since, or hidden by another mount
	}
	if known := t.overs[st.Mnt_id]; known != nil {
		o = known
	}
	if o.clones[e.slot()] == 0 {
		id := t.cloneOf(o, dir, data, e.ref)
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

// cloneOf finds the private clone through which an overlay opens a data file; 0
// if that cannot be told.
func (t *Tracer) cloneOf(o *overlay, dir, data int, ref pack.Ref) uint64 {
	var tried []string
	for _, own := range []bool{true, false} { // what the others know may be true of it, too
		for _, w := range t.watches {
			if w.start.Path == nil || !w.layers[ref.Layer] || o.wants(w) != own {
				continue
			}
			path := strings.TrimPrefix(w.start.Path(ref), "/")
			if path == "" || slices.Contains(tried, path) {
				continue
			}
			tried = append(tried, path)
			var id uint64
			var err error
			t.unlocked(func() { id, err = t.probe(o, dir, data, path) })
			if err != nil {
				log.L.WithError(err).Debug("probe of an overlay failed")
			}
			if id != 0 {
				return id
			}
		}
	}
	return 0
}

// Retry ties mounts to containers that could not be before, since Start.Path of
// some watch did not know where their files are. It may be called at any time.
func (t *Tracer) Retry() {
	t.resolving.Lock()
	defer t.resolving.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	for _, c := range t.mounts {
		if len(c.owners) == 0 && !c.foreign {
			t.resolveAgain(c)
		}
	}
	t.wake()
}

// retryFiles and retryPids bound what is tried for one clone.
const (
	retryFiles = 8
	retryPids  = 4
)

func (t *Tracer) resolveAgain(c *clone) {
	var pids []int32
	for pid := range c.pids {
		if pids = append(pids, pid); len(pids) == retryPids {
			break
		}
	}
	tries := 0
	for _, e := range c.entries {
		dir := t.root.fd
		if e.image != nil {
			dir = e.image.fd
		}
		data, err := openRegular(dir, e.ref.Redirect()[1:])
		if err != nil {
			continue // it has left NVM
		}
		t.resolve(c, e, data, pids...)
		unix.Close(data)
		if tries++; tries == retryFiles || len(c.owners) > 0 || c.foreign {
			break
		}
	}
	for _, w := range c.owners {
		w.touch(t.now())
		w.executed = w.executed || c.ran
	}
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
