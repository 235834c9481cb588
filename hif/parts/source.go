// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// sources are the data roots, opened.
type sources struct{ nvm, hdd int }

func openRoots(r Roots) (*sources, error) {
	nvm, err := openDir(r.NVM)
	if err != nil {
		return nil, err
	}
	hdd, err := openDir(r.HDD)
	if err != nil {
		unix.Close(nvm)
		return nil, err
	}
	return &sources{nvm, hdd}, nil
}

func openDir(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open data root %q: %w", dir, err)
	}
	return fd, nil
}

func (s *sources) close() {
	unix.Close(s.nvm)
	unix.Close(s.hdd)
}

// open opens the data file below a root, which must be of the size that is known. A link, or anything else that leads out of
// the root, is not followed: layers are written by others.
func (s *sources) open(root int, f *File) (*os.File, error) { return openData(root, f) }

func openData(root int, f *File) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV}
	p, err := unix.Openat2(root, f.Redirect[1:], &how)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%w (%w)", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := unix.Fstat(p, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("no regular file: %w", errdefs.ErrFailedPrecondition)
	}
	if st.Size != f.Size {
		return nil, fmt.Errorf("%d bytes, want %d: %w", st.Size, f.Size, errdefs.ErrFailedPrecondition)
	}
	// By way of the descriptor: a FIFO would have blocked, a device might have done anything.
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Redirect), nil
}
