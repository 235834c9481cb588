// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// extents gives the used parts of a region, in ascending order, each of at most burst bytes and good until the next is asked for; io.EOF behind
// the last. An error says that what was given before must not be used.
type extents interface {
	Next() (off int64, data []byte, err error)
}

var zeros [burst]byte

// makeData makes the file of a region in dir: all blocks allocated and written, so that neither the first store into them nor any other has to wait for
// the filesystem or fails for want of space. from nil is a region of zeros. It is synced.
func makeData(ctx context.Context, limit *rate.Limiter, dir string, size int64, from extents) error {
	f, err := os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = fillData(ctx, limit, f, size, from)
	return errors.Join(err, f.Close())
}

func fillData(ctx context.Context, limit *rate.Limiter, f *os.File, size int64, from extents) error {
	// At once, so that blocks lie together, and failure comes early.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("allocate %d bytes: %w", size, err)
	}
	next := int64(0)
	put := func(off int64, data []byte) error {
		if err := limit.WaitN(ctx, len(data)); err != nil {
			return err
		}
		_, err := f.WriteAt(data, off)
		next = off + int64(len(data))
		return err
	}
	zeroTo := func(end int64) error {
		for next < end {
			if err := put(next, zeros[:min(burst, end-next)]); err != nil {
				return err
			}
		}
		return nil
	}
	err := eachExtent(from, func(off int64, data []byte) error {
		if err := zeroTo(off); err != nil {
			return err
		}
		return put(off, data)
	})
	if err == nil {
		err = zeroTo(size)
	}
	if err == nil {
		err = finishData(f, size)
	}
	if err != nil {
		return fmt.Errorf("write region: %w", err)
	}
	return nil
}

func eachExtent(from extents, fn func(off int64, data []byte) error) error {
	if from == nil {
		return nil
	}
	for {
		off, data, err := from.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = fn(off, data)
		}
		if err != nil {
			return err
		}
	}
}

// overlay writes used parts into a file of zeros.
func overlay(ctx context.Context, limit *rate.Limiter, path string, size int64, from extents) error {
	f, err := openData(path, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	err = eachExtent(from, func(off int64, data []byte) error {
		if err := limit.WaitN(ctx, len(data)); err != nil {
			return err
		}
		_, err := f.WriteAt(data, off)
		return err
	})
	if err == nil {
		err = finishData(f, size)
	}
	if err != nil {
		return fmt.Errorf("write region: %w", err)
	}
	return nil
}

// finishData gives programs in containers, which may run as any user, access to the file; what keeps others away is the directory above.
func finishData(f *os.File, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := f.Chmod(0o666); err != nil {
		return err
	}
	return f.Sync()
}

// used reads the used parts of a file of at most size bytes: where the filesystem has data that is not zero, in units of 4 KiB. It never maps the file,
// and takes what is missing at its end for zeros: a container may have cut it.
type used struct {
	f         *os.File
	size, at  int64
	dataEnd   int64
	buf       []byte
	pos, have int // what of buf is still to be looked at
	bufOff    int64
}

func usedOf(f *os.File, size int64) *used { return &used{f: f, size: size, buf: make([]byte, burst)} }

// Next implements extents.
func (u *used) Next() (int64, []byte, error) {
	for {
		for u.pos < u.have && isZero(u.unit(u.pos)) {
			u.pos += len(u.unit(u.pos))
		}
		if from := u.pos; from < u.have {
			for u.pos < u.have && !isZero(u.unit(u.pos)) {
				u.pos += len(u.unit(u.pos))
			}
			return u.bufOff + int64(from), u.buf[from:u.pos], nil
		}
		if err := u.read(); err != nil {
			return 0, nil, err
		}
	}
}

func (u *used) unit(at int) []byte { return u.buf[at:min(at+stream.Unit, u.have)] }

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

func (u *used) read() error {
	if u.at >= u.dataEnd {
		start, err := unix.Seek(int(u.f.Fd()), u.at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && start >= u.size {
			return io.EOF
		}
		if err != nil {
			return fmt.Errorf("look for data in %q: %w", u.f.Name(), err)
		}
		end, err := unix.Seek(int(u.f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("look for holes in %q: %w", u.f.Name(), err)
		}
		// Both may lie within a block that is looked at as a whole.
		u.at, u.dataEnd = max(u.at, start&^(stream.Unit-1)), min(end, u.size)
	}
	n, err := u.f.ReadAt(u.buf[:min(burst, u.dataEnd-u.at)], u.at)
	if n == 0 {
		if err == nil || errors.Is(err, io.EOF) {
			return io.EOF
		}
		return fmt.Errorf("read region: %w", err)
	}
	u.bufOff, u.pos, u.have = u.at, 0, n
	u.at += int64(n)
	return nil
}

// count adds up the used bytes.
func count(from extents) (n int64, err error) {
	err = eachExtent(from, func(_ int64, data []byte) error { n += int64(len(data)); return nil })
	return n, err
}

// clone makes dst share the blocks of src, where the filesystem can.
func clone(dst, src *os.File) bool { return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil }

// sparse copies the used parts into an empty file.
func sparse(ctx context.Context, limit *rate.Limiter, dst *os.File, size int64, from extents) (n int64, err error) {
	err = eachExtent(from, func(off int64, data []byte) error {
		if err := limit.WaitN(ctx, len(data)); err != nil {
			return err
		}
		n += int64(len(data))
		_, err := dst.WriteAt(data, off)
		return err
	})
	if err == nil {
		err = dst.Truncate(size)
	}
	if err != nil {
		return n, fmt.Errorf("copy region: %w", err)
	}
	return n, nil
}

var headerMagic = []byte("SCMREGN1")

// formatted tells whether a file says of itself that scmlib made a region of it. Others are memory whose form only its user knows.
func formatted(path string) (bool, error) {
	f, err := openData(path, os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return hasMagic(f), nil
}

func hasMagic(f *os.File) bool {
	for _, off := range []int64{0, 4096} {
		var b [8]byte
		if _, err := f.ReadAt(b[:], off); err == nil && bytes.Equal(b[:], headerMagic) {
			return true
		}
	}
	return false
}

// adopt makes a copy a region of its own, if scmlib can read it. One that it cannot read stays as it is: its program will be told when it opens it.
func adopt(path string) error {
	ok, err := formatted(path)
	if err != nil || !ok {
		return err
	}
	err = unlocked(func() error { return scmlib.Adopt(path) })
	for _, unreadable := range []error{scmlib.ErrCorrupt, scmlib.ErrVersion, scmlib.ErrSize, scmlib.ErrUnformatted} {
		if errors.Is(err, unreadable) {
			return nil
		}
	}
	return err
}

// unlocked does again what fails because the region is locked. Nobody has it; but a process that this one is starting has, until it executes its program, all
// files that this one had open, and with them a lock that was let go since.
func unlocked(fn func() error) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := fn()
		if !errors.Is(err, scmlib.ErrLocked) || wait > time.Second {
			return err
		}
		time.Sleep(wait)
	}
}
