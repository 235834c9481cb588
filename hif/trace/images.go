// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// image is a mounted EROFS image from which containers read data files: the view
// of a chain, or its parts. It is a filesystem of its own, marked while a start is
// watched that has it.
//
// The descriptor is of a clone of the mount, which is attached nowhere: who
// unmounts the image, or mounts another one in its place, does not find it busy.
type image struct {
	root         // mount is the id of the one that was cloned
	parts   bool // else a view
	watches int  // that are open
	users   int  // these, and those whose result is being measured
}

// watchImage marks the image of which dir is a directory, for parts the mount
// point. Parts that are not there are nil and no error: the overlay will find an
// empty directory. The caller holds t.mu.
func (t *Tracer) watchImage(dir string, parts bool) (*image, error) {
	switch {
	case dir == "" && parts:
		return nil, nil
	case dir == "":
		return nil, fmt.Errorf("the start has no view to read from: %w", errdefs.ErrInvalidArgument)
	}
	r, err := cloneRoot(dir)
	if errors.Is(err, unix.ENOENT) && parts {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if parts {
		var st unix.Statx_t
		if err := statx(r.fd, &st); err != nil || r.dev == t.root.dev || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
			unix.Close(r.fd)
			return nil, err
		}
	} else if r.dev == t.root.dev {
		unix.Close(r.fd)
		return nil, fmt.Errorf("%q is on the filesystem of NVM and not of a view: %w", dir, errdefs.ErrInvalidArgument)
	}
	im := t.images[r.dev]
	if im == nil {
		im = &image{root: r, parts: parts}
	} else {
		unix.Close(r.fd)
	}
	if im.watches == 0 {
		if err := t.markImage(im, unix.FAN_MARK_ADD); err != nil {
			if im.users == 0 {
				unix.Close(im.fd)
			}
			return nil, fmt.Errorf("mark the filesystem of %q: %w", dir, err)
		}
	}
	t.images[im.dev] = im
	im.watches++
	im.users++
	return im, nil
}

// cloneRoot is openRoot by way of a clone of the mount.
func cloneRoot(dir string) (root, error) {
	r, err := openRoot(dir)
	if err != nil {
		return r, err
	}
	defer unix.Close(r.fd)
	clone, err := unix.OpenTree(r.fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return root{fd: -1}, fmt.Errorf("clone the mount of %q: %w", dir, err)
	}
	return root{path: r.path, fd: clone, dev: r.dev, mount: r.mount}, nil
}

// markImage sets or removes the mark, by way of the descriptor: at the path there
// may be another mount.
func (t *Tracer) markImage(im *image, how uint) error {
	return unix.FanotifyMark(t.fd, how|unix.FAN_MARK_FILESYSTEM, eventMask, unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(im.fd))
}

// unwatchImage ends what watchImage began but for the descriptor, for which
// dropImage follows. The caller holds t.mu.
func (t *Tracer) unwatchImage(im *image) {
	if im == nil {
		return
	}
	if im.watches--; im.watches == 0 {
		if err := t.markImage(im, unix.FAN_MARK_REMOVE); err != nil {
			log.L.WithError(err).WithField("path", im.path).Warn("the mark on an image could not be removed")
		}
	}
}

// dropImage gives the descriptor back. The caller holds t.mu.
func (t *Tracer) dropImage(im *image) {
	if im == nil {
		return
	}
	if im.users--; im.users == 0 {
		delete(t.images, im.dev)
		unix.Close(im.fd)
	}
}
