// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// Options of Open. The zero value opens an existing region in the best way its file allows.
type Options struct {
	Create bool  // make the file if there is none, and format it if it is all zeros
	Size   int64 // bytes, a multiple of 4096; needed to make a file. If given for a region that exists, it must be its size

	// Require is the least that the caller can live with. Open fails rather than give less.
	Require Guarantee

	Mode         Mode
	Layout       string // name of the program's data layout, at most 64 bytes. Open fails if the region has another; "" takes any
	ReadOnly     bool   // a private view, recovered in memory; the file is not changed
	AcceptUnsafe bool   // open although the platform lost what it had promised to save

	// Geometry, for Create. 0 takes what suits the size.
	Lanes, LaneSize, ChunkSize int

	hook persist.Hook
}

// Guarantee is what a mapping gives, or must give. Zero fields ask for nothing.
type Guarantee struct {
	Granularity Granularity // or finer
	Durability  Durability  // or more
}

// Open maps the region in the file at path and recovers it. Only one process at a time may have it open for writing; others get ErrLocked.
// Every refusal leaves the file as it was. Errors are classed: see ErrNoRegion and those that follow it.
func Open(path string, o Options) (*Region, error) {
	r, err := open(path, &o)
	if err != nil {
		return nil, err
	}
	r.info.Mode = o.Mode
	return r, nil
}

func open(path string, o *Options) (*Region, error) {
	if o.Mode == DRAM {
		return openDRAM(o)
	}
	f, undo, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	r, err := mapFile(f, path, o)
	if err != nil {
		undo()
		return nil, errors.Join(err, closeFile(f))
	}
	return r, nil
}

// closeFile ends the lock first. It belongs to the open file, which a child has too that another goroutine is just making, until the child
// executes its program: whoever opens the region in that moment would be told that it is in use.
func closeFile(f *os.File) error {
	unlock := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
	return errors.Join(unlock, f.Close())
}

// openDRAM makes a region in anonymous memory: for programs that shall run without SCM, by the user's choice.
func openDRAM(o *Options) (*Region, error) {
	if o.Require.Durability > Volatile {
		return nil, fmt.Errorf("open region: %w: %s is required, and mode dram is anonymous memory", ErrDurability, o.Require.Durability)
	}
	b, err := unix.Mmap(-1, 0, int(o.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("open region: map %d bytes of memory: %w", o.Size, err)
	}
	oo := *o
	oo.Create = true
	r, err := attach(persist.NewMem(b, persist.FenceOnly, persist.None, o.hook), &oo, "(dram)")
	if err != nil {
		unix.Munmap(b)
		return nil, err
	}
	r.release = func() error { return unix.Munmap(b) }
	r.info.Granularity, r.info.Durability, r.info.Why, r.info.Instruction = Byte, Volatile, "anonymous memory, by choice of mode dram", "none"
	return r, nil
}

// OpenImage opens a region that lies in memory: a copy that is examined, or a test. It changes b.
func OpenImage(b []byte, o Options) (*Region, error) {
	r, err := attach(persist.NewMem(b, persist.FenceOnly, persist.None, o.hook), &o, "(image)")
	if err == nil {
		r.info.Granularity, r.info.Durability, r.info.Why, r.info.Mode = Byte, Volatile, "memory of the process", DRAM
	}
	return r, err
}

// openFile opens, locks and, if it is to be made, sizes the file. undo takes back what was made, as long as the lock is held.
func openFile(path string, o *Options) (f *os.File, undo func(), err error) {
	flags := unix.O_RDWR
	if o.ReadOnly {
		flags = unix.O_RDONLY
	}
	made := false
	f, err = os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) && o.Create && !o.ReadOnly {
		if o.Size == 0 {
			return nil, nil, fmt.Errorf("create region %q: %w: no size given", path, ErrSize)
		}
		if _, err := newGeometry(uint64(o.Size), o); err != nil {
			return nil, nil, fmt.Errorf("create region %q: %w", path, err)
		}
		f, err = os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_CREAT|unix.O_EXCL, 0o600)
		made = err == nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("open region %q: %w (%w); make it with Create, or give the container a region", path, ErrNoRegion, err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open region %q: %w", path, err)
	}
	grown := false
	undo = func() {
		switch {
		case made:
			os.Remove(path)
		case grown:
			_ = f.Truncate(0)
		}
	}
	if err := prepareFile(f, path, o, &grown); err != nil {
		undo()
		return nil, nil, errors.Join(err, closeFile(f))
	}
	return f, undo, nil
}

func prepareFile(f *os.File, path string, o *Options, grown *bool) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open region %q: %w", path, err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("open region %q: %w: it is not a regular file but %s", path, ErrNoRegion, st.Mode().Type())
	}
	// An open file description lock belongs to the inode, so it holds across containers and bind mounts, and it ends with the process.
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if o.ReadOnly {
		lk.Type = unix.F_RDLCK
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("open region %q: %w: another process has it open", path, ErrLocked)
	} else if err != nil {
		return fmt.Errorf("lock region %q: %w", path, err)
	}
	if st, err = f.Stat(); err != nil {
		return fmt.Errorf("open region %q: %w", path, err)
	}
	if st.Size() != 0 {
		return nil
	}
	if !o.Create || o.ReadOnly {
		return fmt.Errorf("open region %q: %w: the file is empty", path, ErrUnformatted)
	}
	if _, err := newGeometry(uint64(o.Size), o); err != nil {
		return fmt.Errorf("create region %q: %w", path, err)
	}
	*grown = true
	// All blocks now: a store into a hole of a full file system would be a SIGBUS later.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, o.Size); errors.Is(err, unix.EOPNOTSUPP) {
		err = f.Truncate(o.Size)
		if err != nil {
			return fmt.Errorf("create region %q of %d bytes: %w", path, o.Size, err)
		}
	} else if err != nil {
		return fmt.Errorf("create region %q of %d bytes: %w", path, o.Size, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("create region %q: sync: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("create region %q: %w", path, err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // some filesystems cannot
		return fmt.Errorf("create region %q: sync directory: %w", path, err)
	}
	return nil
}

// mapFile maps the file in the best way there is, compares that with what is required, and attaches.
func mapFile(f *os.File, path string, o *Options) (*Region, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open region %q: %w", path, err)
	}
	if st.Size() < minSize || st.Size() > maxSize {
		return nil, fmt.Errorf("open region %q: %w: the file has %d bytes; a region has %d to %d", path, ErrSize, st.Size(), minSize, int64(maxSize))
	}
	n := int(st.Size())
	p := probeFile(f, path)
	flags := unix.MAP_SHARED
	if o.ReadOnly {
		flags = unix.MAP_PRIVATE
	}
	var b []byte
	if !o.ReadOnly {
		if b, err = unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC); err == nil {
			p.mapSync = true
		}
	}
	if b == nil {
		if b, err = unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
			return nil, fmt.Errorf("map region %q: %w", path, err)
		}
	}
	v := p.judge(o.Mode)
	if err := v.override(os.Getenv); err != nil {
		unix.Munmap(b)
		return nil, fmt.Errorf("open region %q: %w", path, err)
	}
	if v.forced {
		slog.Warn("scmlib: the environment overrides what the mapping gives; data may be lost", "region", path, "granularity", v.gran.String(),
			"durability", v.dur.String())
	}
	r, err := attachVerdict(b, v, path, o)
	if err != nil {
		unix.Munmap(b)
		return nil, err
	}
	r.release = func() error { return errors.Join(unix.Munmap(b), closeFile(f)) }
	r.info.Filesystem, r.info.Mount, r.info.DAX, r.info.MapSync, r.info.EADR = p.fstype, p.mount, p.dax, p.mapSync, p.eadr
	return r, nil
}

func attachVerdict(b []byte, v verdict, path string, o *Options) (*Region, error) {
	if err := v.satisfies(o); err != nil {
		return nil, fmt.Errorf("open region %q: %w", path, err)
	}
	way, insn := persist.Pages, persist.Best()
	switch {
	case o.ReadOnly || v.gran == Byte:
		way = persist.FenceOnly
	case v.gran == CacheLine:
		way = persist.Lines
	}
	r, err := attach(persist.NewMem(b, way, insn, o.hook), o, path)
	if err != nil {
		return nil, err
	}
	r.info.Granularity, r.info.Durability, r.info.Why, r.info.Forced = v.gran, v.dur, v.why, v.forced
	switch v.gran {
	case Byte:
		r.info.Instruction = "none"
	case Page:
		r.info.Instruction = "msync"
	}
	return r, nil
}
