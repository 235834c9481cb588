// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	eventMask = unix.FAN_OPEN | unix.FAN_OPEN_EXEC
	statxMask = unix.STATX_TYPE | unix.STATX_INO | unix.STATX_SIZE | unix.STATX_BTIME | unix.STATX_MNT_ID_UNIQUE
	// eventFlags open the descriptor of an event. O_NONBLOCK: should a kernel
	// report the open of a FIFO (6.18 does not), its descriptor would else be
	// opened like any FIFO, and the reader would wait for the other end.
	eventFlags = unix.O_RDONLY | unix.O_LARGEFILE | unix.O_CLOEXEC | unix.O_NONBLOCK
)

// devnum is a device number as stat has it.
type devnum struct{ major, minor uint32 }

func devOf(st *unix.Statx_t) devnum { return devnum{st.Dev_major, st.Dev_minor} }

// initGroup opens a notification group. FAN_REPORT_FD_ERROR (Linux 6.13,
// commit 522249f05c5e) makes an event whose descriptor cannot be opened, for
// want of descriptors or memory, visible; before, read(2) may drop it silently.
func initGroup(unlimited bool) (int, error) {
	flags := uint(unix.FAN_CLASS_NOTIF | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK)
	if unlimited {
		flags |= unix.FAN_UNLIMITED_QUEUE
	}
	fd, err := unix.FanotifyInit(flags|unix.FAN_REPORT_FD_ERROR, eventFlags)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.FanotifyInit(flags, eventFlags)
	}
	return fd, err
}

// mark sets or removes the marks on NVM. Opens through the mount that the data
// root itself stands on are ignored by the kernel: these are the daemon's own.
// Nobody's overlay is among them, for overlayfs clones the mounts it is given.
func (t *Tracer) mark(on bool) error {
	flags := uint(unix.FAN_MARK_ADD)
	if !on {
		flags = unix.FAN_MARK_REMOVE
	}
	if err := unix.FanotifyMark(t.fd, flags|unix.FAN_MARK_MOUNT|unix.FAN_MARK_IGNORE_SURV, eventMask, unix.AT_FDCWD, t.root.path); err != nil && on {
		return fmt.Errorf("ignore the mount of %q: %w", t.root.path, err)
	}
	err := unix.FanotifyMark(t.fd, flags|unix.FAN_MARK_FILESYSTEM, eventMask, unix.AT_FDCWD, t.root.path)
	if err == nil {
		return nil
	}
	if on {
		_ = t.mark(false) // what was set; the cause is reported
	}
	return fmt.Errorf("mark the filesystem of %q: %w", t.root.path, err)
}

var empty byte // the empty path of statx: unix.Statx would allocate one for each event

func statx(fd int, st *unix.Statx_t) error {
	_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(&empty)),
		unix.AT_EMPTY_PATH, statxMask, uintptr(unsafe.Pointer(st)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// isRoot tells whether a mount is the one that the data root stands on, or that
// of an image: opens through it are of nobody's container.
func (t *Tracer) isRoot(mount uint64) bool {
	for _, im := range t.images {
		if im.mount == mount {
			return true
		}
	}
	return mount == t.root.mount
}

// pathOf reads where a descriptor points, as seen from the root of its mount.
func (t *Tracer) pathOf(fd int) (string, error) {
	n, err := unix.Readlink("/proc/self/fd/"+strconv.Itoa(fd), t.linkbuf[:])
	if err != nil {
		return "", err
	}
	return string(t.linkbuf[:n]), nil
}

// errDAX says that a file has no page cache.
var errDAX = errors.New("the file is mapped straight from its device")

// cached is how many bytes of a part of a file are in the page cache, and how
// many were there and have been evicted. Length 0 means to the end.
//
// Of a DAX file it must not be asked, which is errDAX: what the kernel keeps in
// place of pages then, cachestat(2) takes for traces of evicted ones, and follows
// them to nowhere. Linux 6.12 dies of it (mm/filemap.c, filemap_cachestat), and
// with it whoever holds a lock of ours.
func cached(fd int, off, length int64) (in, evicted int64, err error) {
	var stx unix.Statx_t
	if err := statx(fd, &stx); err != nil {
		return 0, 0, err
	}
	if stx.Attributes&unix.STATX_ATTR_DAX != 0 {
		return 0, 0, errDAX
	}
	var st unix.Cachestat_t
	r := unix.CachestatRange{Off: uint64(off), Len: uint64(length)}
	if err := unix.Cachestat(uint(fd), &r, &st, 0); err != nil {
		return 0, 0, err
	}
	page := int64(os.Getpagesize())
	return int64(st.Cache) * page, int64(st.Evicted) * page, nil
}

// openRegular opens a regular file beneath dir, never following a link or
// leaving the mount, and never anything else: opening a FIFO or a device of a
// container would have effects.
func openRegular(dir int, path string) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV}
	p, err := unix.Openat2(dir, path, &how)
	if err != nil {
		return -1, err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := unix.Fstat(p, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, unix.EINVAL
	}
	return unix.Open("/proc/self/fd/"+strconv.Itoa(p), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
}
