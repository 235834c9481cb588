// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"strings"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// batch is how many events one read takes: each comes with an open descriptor,
// and the daemon needs descriptors for other things too.
const batch = 512

// settle is how often deadlines are looked at while events never stop coming.
const settle = 100 * time.Millisecond

// Bounds of what is remembered about overlays and clones that belong to no
// watch. Beyond them it is forgotten and found out again.
const (
	maxOverlays = 4096
	maxClones   = 16384
)

// clone is one private mount of a layer, as overlayfs makes them.
type clone struct {
	id      uint64
	foreign bool              // not of data files of ours, or of no start that is watched
	owners  []*Watch          // empty: not known yet
	entries map[uint64]*entry // by inode
	layers  map[uint64]bool   // of all files that were opened through it, dropped ones too
	tries   int
	fitted  bool // it may have been of a start that has ended; see Tracer.fits
	// pids are of processes that opened files through it, and whether they
	// executed something through it.
	pids map[int32]bool
	ran  bool // one of them did
}

// maxPids bounds the processes that are remembered of a clone.
const maxPids = 4096

// by keeps who opened a file. Processes that are not in a namespace of ours are all 0.
func (c *clone) by(pid int32, executes bool) {
	if pid <= 0 || len(c.pids) >= maxPids {
		return
	}
	if c.pids == nil {
		c.pids = map[int32]bool{}
	}
	c.pids[pid] = c.pids[pid] || executes
}

// akin tells whether a process that executed something through o opened files
// through c: they are of one container. Who looks at containers from outside
// executes nothing in them.
func (c *clone) akin(o *clone) bool {
	for pid := range c.pids {
		if o.pids[pid] {
			return true
		}
	}
	return false
}

// entry is one file as opened through one clone.
type entry struct {
	ref     pack.Ref
	image   *image              // that it was opened in; nil: on NVM
	born    unix.StatxTimestamp // an inode number may come again, with another birth
	first   time.Duration
	opens   int
	exec    bool
	size    int64
	warm    int64 // bytes in the page cache when first seen; -1 unknown
	evicted int64 // bytes that had left it by then
}

// slot is the place of the file's data-only layer in overlay.clones.
func (e *entry) slot() int {
	switch {
	case e.image == nil:
		return nvmSlot
	case e.image.parts:
		return partsSlot
	}
	return homeSlot
}

func (e *entry) tier() placement.Tier {
	if e.slot() == homeSlot {
		return placement.HDD
	}
	return placement.NVM
}

// read is the reader: the only goroutine that takes events from the group.
func (t *Tracer) read() {
	defer t.wg.Done()
	fd := t.fd
	buf := make([]byte, batch*unix.FAN_EVENT_METADATA_LEN)
	last := time.Now()
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if again, done := t.tick(true); done {
				return
			} else if !again {
				t.wait(fd)
			}
			last = time.Now()
		case err != nil:
			// Not seen in practice: a descriptor that cannot be opened without
			// FAN_REPORT_FD_ERROR. The event is gone.
			t.mu.Lock()
			t.stats.Lost++
			t.mu.Unlock()
			log.L.WithError(err).Warn("an event of a cold start was lost")
			if _, done := t.tick(false); done {
				return
			}
		default:
			t.resolving.Lock()
			t.mu.Lock()
			for b := buf[:n]; len(b) >= unix.FAN_EVENT_METADATA_LEN; {
				ev := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
				t.event(ev)
				if int(ev.Event_len) < unix.FAN_EVENT_METADATA_LEN || int(ev.Event_len) > len(b) {
					break
				}
				b = b[ev.Event_len:]
			}
			t.mu.Unlock()
			t.resolving.Unlock()
			if time.Since(last) > settle {
				last = time.Now()
				if _, done := t.tick(false); done {
					return
				}
			}
		}
	}
}

// wait returns when there may be events, or when tick or wake say so.
func (t *Tracer) wait(fd int) {
	_ = t.conn.Read(func(uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
}

// event takes one event. The caller holds t.resolving and t.mu.
func (t *Tracer) event(ev *unix.FanotifyEventMetadata) {
	t.stats.Events++
	if ev.Mask&unix.FAN_Q_OVERFLOW != 0 {
		t.stats.Overflows++
		return
	}
	if ev.Fd < 0 {
		t.stats.Lost++
		return
	}
	fd := int(ev.Fd)
	defer unix.Close(fd)
	if ev.Pid == t.self && !t.cfg.countSelf || len(t.watches) == 0 {
		return
	}
	var st unix.Statx_t
	if err := statx(fd, &st); err != nil {
		t.stats.Lost++
		return
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || t.isRoot(st.Mnt_id) {
		return
	}
	c := t.mounts[st.Mnt_id]
	if c == nil {
		if len(t.mounts) >= maxClones {
			t.forgetForeign()
		}
		c = &clone{id: st.Mnt_id, entries: map[uint64]*entry{}, layers: map[uint64]bool{}}
		t.mounts[st.Mnt_id] = c
	}
	if c.foreign {
		return
	}
	e := c.entries[st.Ino]
	if e == nil || e.born != st.Btime {
		if e = t.enter(c, fd, &st); e == nil {
			return
		}
	}
	e.opens++
	execs := ev.Mask&unix.FAN_OPEN_EXEC != 0
	e.exec, c.ran = e.exec || execs, c.ran || execs
	c.by(ev.Pid, execs)
	t.stats.Opens[e.tier()]++
	if e.slot() == partsSlot {
		t.stats.Parts++
	}
	if e.opens == 1 {
		t.first(c, e, fd, ev.Pid)
	}
	if e.exec {
		for _, w := range c.owners {
			w.executed = true
		}
	}
}

// enter finds out what file an event is of. It returns nil if the clone turned
// out to be of no watched start, or if there is no room for more files.
func (t *Tracer) enter(c *clone, fd int, st *unix.Statx_t) *entry {
	if t.files >= t.cfg.Files {
		t.stats.Lost++
		return nil
	}
	p, err := t.pathOf(fd)
	if err != nil {
		t.stats.Lost++
		return nil
	}
	e := &entry{born: st.Btime, first: t.now(), size: int64(st.Size), warm: -1}
	found := t.identify(e, p, st)
	if !found && !strings.HasSuffix(p, deleted) {
		// It may have left NVM since its path was read; taken for a file of another
		// directory, it would cost the start all that comes through this clone.
		if now, err := t.pathOf(fd); err == nil && now != p {
			p = now
			found = t.identify(e, p, st)
		}
	}
	if name, gone := strings.CutSuffix(p, deleted); !found && gone {
		if !t.identifyGone(e, name, st) {
			return nil // an unlinked file of nobody we know; the next one may tell more
		}
		found = true
	}
	if found {
		c.layers[e.ref.Layer] = true
	}
	// Where it is no data file, the clone is of another directory, say of an upper
	// one, and so are all the files that will come through it. Where no watched
	// start has its layer, the clone is of none of them, for a start opens files
	// of its layers alone.
	if !found || len(c.owners) == 0 && !t.concerns(e.ref.Layer) {
		t.drop(c)
		c.foreign = true
		return nil
	}
	if in, evicted, err := cached(fd, 0, 0); err == nil {
		e.warm, e.evicted = in, evicted
	}
	if old := c.entries[st.Ino]; old != nil {
		// The inode number was used again: keep the old file under a number
		// that no inode has had.
		c.entries[^uint64(len(c.entries))] = old
	}
	c.entries[st.Ino] = e
	t.files++
	return e
}

// deleted is what the kernel adds to the path of a file that has been unlinked.
const deleted = " (deleted)"

// concerns tells whether a layer is of the image of a watched start.
func (t *Tracer) concerns(layer uint64) bool {
	for _, w := range t.watches {
		if w.layers[layer] {
			return true
		}
	}
	return false
}

// identify names the data file at a path below the root of its mount, and proves
// it by its inode.
func (t *Tracer) identify(e *entry, p string, st *unix.Statx_t) bool {
	ref, err := pack.ParseRedirect(p)
	if err != nil {
		return false
	}
	dir, im := t.root.fd, t.images[devOf(st)]
	if im != nil {
		dir = im.fd
	}
	var at unix.Statx_t
	if err := unix.Statx(dir, p[1:], unix.AT_SYMLINK_NOFOLLOW, statxMask, &at); err != nil || at.Ino != st.Ino || devOf(&at) != devOf(st) {
		return false
	}
	e.ref, e.image = ref, im
	return true
}

// identifyGone names a file that was opened on NVM and unlinked since. It was
// replaced there, or it stands in the view of a start that has its layer, with
// the same size. Temporary files that containers write are unlinked, too.
func (t *Tracer) identifyGone(e *entry, p string, st *unix.Statx_t) bool {
	ref, err := pack.ParseRedirect(p)
	if err != nil || devOf(st) != t.root.dev {
		return false
	}
	same := func(dir int) bool {
		var at unix.Statx_t
		err := unix.Statx(dir, p[1:], unix.AT_SYMLINK_NOFOLLOW, statxMask, &at)
		return err == nil && at.Mode&unix.S_IFMT == unix.S_IFREG && at.Size == st.Size
	}
	for _, w := range t.watches {
		if w.layers[ref.Layer] && (same(t.root.fd) || same(w.home.fd)) {
			e.ref = ref
			return true
		}
	}
	return false
}
