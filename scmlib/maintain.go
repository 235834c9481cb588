// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// Adopt makes the copy of a region at path one of its own: what was in flight is rolled back, and it gets a new uuid that names the old one as its
// parent. The unsafe-shutdown count of the machine that the original lived on is forgotten. Errors are those of [Open].
func Adopt(path string) error {
	r, err := Open(path, Options{AcceptUnsafe: true})
	if err != nil {
		return err
	}
	return r.adopt()
}

// adopt closes the region as another one.
func (r *Region) adopt() error {
	// The records in the lanes carry a salt from the uuid. They are void since recovery, so the new uuid cannot revive or lose any.
	r.hdr.parent = r.hdr.uuid
	_, err := rand.Read(r.hdr.uuid[:])
	r.hdr.hostUSC, r.hdr.seen, r.hdr.hostDev = 0, 0, [16]byte{}
	return errors.Join(err, r.Close())
}

// Stamp writes into a region that nobody has open how often the memory device it lies on has lost what it had promised to save. The next open compares
// that with what it was when the region was last in use: see docs/scm.md, unsafe shutdown. Nothing else is changed or recovered.
func Stamp(path string, count uint64, device [16]byte) (err error) {
	f, _, err := openFile(path, &Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeFile(f)) }()
	st, err := f.Stat()
	if err == nil && st.Size() < minSize {
		err = fmt.Errorf("%w: the file has %d bytes", ErrSize, st.Size())
	}
	if err != nil {
		return fmt.Errorf("stamp region %q: %w", path, err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, minSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("stamp region %q: %w", path, err)
	}
	r := &Region{mem: persist.NewMem(b, persist.Pages, persist.Best(), nil), info: Info{Path: path}}
	if err = r.guard(func() error { return stamp(r.mem, count, device) }); err != nil {
		err = fmt.Errorf("stamp region %q: %w", path, err)
	}
	return errors.Join(err, unix.Munmap(b))
}

func stamp(m *persist.Mem, count uint64, device [16]byte) error {
	h, staleA, _, err := readHeader(m)
	if err != nil || h.hostUSC == count && h.hostDev == device {
		return err
	}
	if staleA {
		if err := healHeader(m, &h); err != nil {
			return err
		}
	}
	if h.hostDev != device && h.hostDev != [16]byte{} {
		h.seen = count // of another device: nothing is known of this one's past
	}
	h.hostUSC, h.hostDev = count, device
	return writeHeader(m, &h)
}

// Grow makes a region that nobody has open larger. extend brings the file to the new size: blocks allocated, zeros behind the old end. Cut short, the
// file is of the new size and the header of the old one or the new one: cut the file to the old size in the first case, and grow it again. How far a
// region can grow depends on the room in its chunk table; what does not fit is ErrSize, before extend is called.
func Grow(path string, size int64, extend func(*os.File) error) (err error) {
	o := Options{AcceptUnsafe: true}
	f, _, err := openFile(path, &o)
	if err != nil {
		return err
	}
	r, err := mapFile(f, path, &o)
	if err != nil {
		return errors.Join(err, closeFile(f))
	}
	err = r.grow(uint64(size), func() error {
		if err := extend(f); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("grow region %q: %w", path, err)
	}
	return err
}

// grow closes the region as a larger one, if extend makes the medium durably so.
func (r *Region) grow(size uint64, extend func() error) (err error) {
	defer func() { err = errors.Join(err, r.Close()) }() // it writes the header
	g, err := r.grown(size)
	if err != nil {
		return err
	}
	// Words of the table that were not in use may hold anything.
	if n := 8 * uint64(g.chunkCount-r.chunkCount); n > 0 {
		err = r.guard(func() error {
			r.mem.Zero(r.word(r.chunkCount), n)
			r.mem.Flush(r.word(r.chunkCount), n)
			return r.fence()
		})
	}
	if err == nil {
		err = extend()
	}
	if err == nil {
		r.hdr.geometry = g
	}
	return err
}

// grown is the geometry of the region with more chunks behind those it has.
func (r *Region) grown(size uint64) (geometry, error) {
	g := r.geometry
	if size <= g.size || size > maxSize || size%4096 != 0 {
		return g, fmt.Errorf("%w: it has %d bytes and can become larger, by multiples of 4096, not %d", ErrSize, g.size, size)
	}
	g.size = size
	room, chunks := (g.heapOff-g.tableOff)/8, (size-g.heapOff)/uint64(g.chunkSize)
	if chunks > room {
		return g, fmt.Errorf("%w: its chunk table has room for %d bytes, not %d; copy its data to a new region", ErrSize,
			g.heapOff+room*uint64(g.chunkSize), size)
	}
	g.chunkCount = max(uint32(chunks), g.chunkCount)
	return g, g.check()
}
