// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// Data files stand on NVM alone, at d/<layer>/<hh>/<n>: n is the number of the
// file in its layer, hh its low eight bits, so that no directory grows large.

// Entry is a data file on NVM.
type Entry struct {
	Number uint32
	Size   int64 // bytes
	Bytes  int64 // bytes that it occupies
}

// DataRoot is the data-only layer of NVM.
func (s *Store) DataRoot() string { return filepath.Join(s.roots[placement.NVM], "d") }

// LayerData is the directory of a layer on NVM. It may not exist.
func (s *Store) LayerData(layer string) string { return filepath.Join(s.DataRoot(), layer) }

// DataFile is the path of a data file on NVM.
func (s *Store) DataFile(layer string, n uint32) string {
	return filepath.Join(s.LayerData(layer), fmt.Sprintf("%02x", n&0xff), strconv.FormatUint(uint64(n), 10))
}

// DataSize is the size of a data file on NVM, -1 if it is not there.
func (s *Store) DataSize(layer string, n uint32) int64 {
	st, err := os.Lstat(s.DataFile(layer, n))
	if err != nil || !st.Mode().IsRegular() {
		return -1
	}
	return st.Size()
}

// withDirs makes the directories of a data file and tries do again.
func (s *Store) withDirs(path string, do func() error) error {
	err := do()
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return do()
}

// CreateData makes a data file under its name. Nobody may know of its layer yet.
func (s *Store) CreateData(layer string, n uint32) (f *os.File, err error) {
	path := s.DataFile(layer, n)
	err = s.withDirs(path, func() error {
		f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create a data file on NVM: %w", err)
	}
	return f, nil
}

// LinkData gives an open file of NVM its place as a data file.
func (s *Store) LinkData(f *os.File, layer string, n uint32) error {
	path := s.DataFile(layer, n)
	err := s.withDirs(path, func() error {
		return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	})
	if err != nil {
		return fmt.Errorf("link a data file on NVM: %w", err)
	}
	return nil
}

// PlaceData renames a file of NVM that is whole to its place as a data file.
func (s *Store) PlaceData(from, layer string, n uint32) error {
	path := s.DataFile(layer, n)
	return s.withDirs(path, func() error { return os.Rename(from, path) })
}

// RemoveData deletes all that stands of a layer on NVM.
func (s *Store) RemoveData(layer string) error { return os.RemoveAll(s.LayerData(layer)) }

// OnNVM goes through the data files of a layer on NVM, in no order; nothing
// stands of a layer that is not there, nor of what is removed meanwhile. It ends
// after the first error.
func (s *Store) OnNVM(layer string) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		err := filepath.WalkDir(s.LayerData(layer), func(_ string, d fs.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil || d.IsDir() {
				return err
			}
			n, ours := number(d.Name())
			if !ours {
				return nil
			}
			info, err := d.Info()
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if !yield(Entry{Number: n, Size: info.Size(), Bytes: 512 * stat(info).Blocks}, nil) {
				return fs.SkipAll
			}
			return nil
		})
		if err != nil {
			yield(Entry{}, fmt.Errorf("list layer %s on NVM: %w", layer, err))
		}
	}
}

// number is that of a data file by its name.
func number(name string) (uint32, bool) {
	n, err := strconv.ParseUint(name, 10, 32)
	return uint32(n), err == nil
}

// DataLayers lists the names in the data root of NVM.
func (s *Store) DataLayers() ([]string, error) { return readNames(s.DataRoot()) }

// Passing reads a file from an offset on and leaves in the page cache only what
// was there before (Linux 6.14): cached for a copy, it would take memory from
// others, and a start that is traced meanwhile would seem to touch all of it.
func Passing(f *os.File, off int64) io.Reader { return &passing{f, off, unix.RWF_DONTCACHE} }

type passing struct {
	file  *os.File
	off   int64
	flags int
}

func (p *passing) Read(b []byte) (int, error) {
	n, err := unix.Preadv2(int(p.file.Fd()), [][]byte{b}, p.off, p.flags)
	if err != nil && p.flags != 0 && !errors.Is(err, unix.EINTR) { // an older kernel, or a filesystem that cannot
		p.flags = 0
		n, err = p.file.ReadAt(b, p.off)
		if n > 0 {
			err = nil
		}
	}
	switch {
	case errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	p.off += int64(n)
	return n, nil
}

// Uncached is a file that is written from its beginning on. Beyond the first bytes
// its pages leave the page cache once they are written to the device (Linux 6.14),
// without anybody waiting for that. Of what is cached no trace can tell whether a
// start has touched it.
type Uncached struct {
	*os.File
	from  int64
	off   int64
	flags int
}

// NewUncached writes f, which must be empty. What is shorter than from bytes
// stays cached, as it does where the kernel or the filesystem cannot do better.
func NewUncached(f *os.File, from int64) *Uncached {
	return &Uncached{f, from, 0, unix.RWF_DONTCACHE}
}

// Write implements [io.Writer].
func (u *Uncached) Write(p []byte) (written int, err error) {
	long := u.off+int64(len(p)) >= u.from
	for written < len(p) {
		flags := 0
		if long {
			flags = u.flags
		}
		n, err := unix.Pwritev2(int(u.Fd()), [][]byte{p[written:]}, u.off, flags)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil && flags != 0: // cannot do it; else the next try fails as well
			u.flags = 0
			continue
		case err != nil:
			return written, &os.PathError{Op: "write", Path: u.Name(), Err: err}
		case n == 0:
			return written, io.ErrShortWrite
		}
		written, u.off = written+n, u.off+int64(n)
	}
	return written, nil
}

func stat(info fs.FileInfo) *syscall.Stat_t {
	return info.Sys().(*syscall.Stat_t) //nolint:forcetypeassert // it comes from lstat(2)
}
