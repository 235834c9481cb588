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

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Packs knows where the bytes of data files stand on HDD. Its methods may be called from several goroutines.
type Packs interface {
	// PackPath is the path of the pack of a layer, whether it is there or not.
	PackPath(layer uint64) string
	// PackFile says where in the pack of its layer a file begins, in blocks of [pack.BlockSize], and how many bytes it has.
	// The error is errdefs.ErrNotFound if there is no such file.
	PackFile(ref pack.Ref) (block uint32, size int64, err error)
}

// sources are the files from which an image is made: packs, and the data root on NVM.
type sources struct {
	*contents
	nvm   int
	files []*os.File // packs by device, the first is number 1
}

// openSources finds all files of a set, which passes check. All packs are opened, also those of which all is hot or on NVM:
// they are the devices.
func openSources(set Set, nvm string, packs Packs) (*sources, error) {
	c, err := newContents(set)
	if err != nil {
		return nil, err
	}
	for i, ref := range c.refs {
		f := &c.Files[i]
		block, size, err := packs.PackFile(ref)
		switch {
		case err != nil:
			return nil, fmt.Errorf("find %q in its pack: %w", f.Redirect, err)
		case size != f.Size:
			return nil, fmt.Errorf("%q has %d bytes, want %d: %w", f.Redirect, size, f.Size, errdefs.ErrFailedPrecondition)
		case int64(block)+chunks(f.Size) > maxBlock:
			return nil, fmt.Errorf("%q begins at block %d of its pack, which cannot be addressed: %w", f.Redirect, block, errdefs.ErrInvalidArgument)
		}
		c.blocks[i] = block
	}
	s := &sources{contents: c}
	if s.nvm, err = unix.Open(nvm, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open data root %q: %w", nvm, err)
	}
	if s.files, err = c.openPacks(packs.PackPath); err != nil {
		unix.Close(s.nvm)
		return nil, err
	}
	return s, nil
}

func (s *sources) close() {
	unix.Close(s.nvm)
	closeAll(s.files)
}

// openFile opens what a file is copied from: the file on NVM, else its pack. base is where it begins there.
func (s *sources) openFile(file int) (in *os.File, base int64, done func(), err error) {
	f := &s.Files[file]
	fast, err := openRegular(s.nvm, f.Redirect[1:])
	switch {
	case errdefs.IsNotFound(err):
		return s.files[s.device(file)-1], int64(s.blocks[file]) * pack.BlockSize, func() {}, nil
	case err != nil:
		return nil, 0, nil, fmt.Errorf("%q on NVM: %w", f.Redirect, err)
	}
	st, err := fast.Stat()
	if err == nil && st.Size() != f.Size {
		err = fmt.Errorf("%d bytes, want %d: %w", st.Size(), f.Size, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		fast.Close()
		return nil, 0, nil, fmt.Errorf("%q on NVM: %w", f.Redirect, err)
	}
	return fast, 0, func() { fast.Close() }, nil
}

// openPacks opens the packs, which must be as large as the image takes them for.
func (c *contents) openPacks(path func(layer uint64) string) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	for i, layer := range c.packs {
		f, err := openRegular(unix.AT_FDCWD, path(layer))
		if err != nil {
			return files, fmt.Errorf("pack of layer %d: %w", layer, err)
		}
		files = append(files, f)
		st, err := f.Stat()
		if err != nil {
			return files, fmt.Errorf("pack of layer %d: %w", layer, err)
		}
		if need := c.size(uint16(i+1)) * pack.BlockSize; st.Size() < need {
			return files, fmt.Errorf("pack of layer %d: %d bytes, want at least %d: %w", layer, st.Size(), need, errdefs.ErrFailedPrecondition)
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// openRegular opens a regular file. A link is not followed, nor, below a directory, anything else that leads out of it: a
// redirect may come from a registry.
func openRegular(dir int, name string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW}
	if dir != unix.AT_FDCWD {
		how.Flags &^= unix.O_NOFOLLOW // which would open the link itself
		how.Resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV
	}
	p, err := unix.Openat2(dir, name, &how)
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
	// By way of the descriptor: a FIFO would have blocked, a device might have done anything.
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
