// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// partsRoot is the mount of an image's parts: a filesystem of its own, marked while
// a start is watched that has it. The descriptor keeps it, should another one
// take its place meanwhile.
type partsRoot struct {
	root
	watches int // that are open
	users   int // these, and those whose result is being measured
}

// watchParts marks the parts mounted on point. Nil: nothing is mounted there,
// and the overlay will find an empty directory. The caller holds t.mu.
func (t *Tracer) watchParts(point string) (*partsRoot, error) {
	if point == "" {
		return nil, nil
	}
	r, err := openRoot(point)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p := t.parts[r.dev]
	if p == nil {
		var st unix.Statx_t
		if err := statx(r.fd, &st); err != nil || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
			unix.Close(r.fd)
			return nil, err
		}
		p = &partsRoot{root: r}
	} else {
		unix.Close(r.fd)
	}
	if p.watches == 0 {
		if err := t.markParts(p, unix.FAN_MARK_ADD); err != nil {
			if p.users == 0 {
				unix.Close(p.fd)
			}
			return nil, fmt.Errorf("mark the parts at %q: %w", point, err)
		}
	}
	t.parts[p.dev] = p
	p.watches++
	p.users++
	return p, nil
}

// markParts sets or removes the mark, by way of the descriptor: at the path there
// may be another mount.
func (t *Tracer) markParts(p *partsRoot, how uint) error {
	return unix.FanotifyMark(t.fd, how|unix.FAN_MARK_FILESYSTEM, eventMask, unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(p.fd))
}

// unwatchParts ends what watchParts began but for the descriptor, for which
// dropParts follows. The caller holds t.mu.
func (t *Tracer) unwatchParts(p *partsRoot) {
	if p == nil {
		return
	}
	if p.watches--; p.watches == 0 {
		if err := t.markParts(p, unix.FAN_MARK_REMOVE); err != nil {
			log.L.WithError(err).Warn("the mark on parts could not be removed")
		}
	}
}

// dropParts gives the descriptor back. The caller holds t.mu.
func (t *Tracer) dropParts(p *partsRoot) {
	if p == nil {
		return
	}
	if p.users--; p.users == 0 {
		delete(t.parts, p.dev)
		unix.Close(p.fd)
	}
}

// identifyParts is [Tracer.identify] for an event on a filesystem of parts. It
// cannot change, so there is nothing that was unlinked or moved.
func (t *Tracer) identifyParts(p *partsRoot, e *entry, layer, path string, st *unix.Statx_t) {
	var at unix.Statx_t
	err := unix.Statx(p.fd, layer+"/"+path, unix.AT_SYMLINK_NOFOLLOW, statxMask, &at)
	if err == nil && at.Ino == st.Ino && devOf(&at) == devOf(st) {
		e.layer, e.path, e.tier, e.parts = layer, path, nvm, true
	}
}
