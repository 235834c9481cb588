// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// restoreBlocks gives a region its size and its blocks back before it is given to anybody. With alone nobody has it, and holes are written as well, so that no
// store into them waits for the filesystem. The caller holds the region. ErrResourceExhausted: NVM has no room for the blocks.
func (s *Store) restoreBlocks(ctx context.Context, r Record, alone bool) error {
	f, err := openData(s.data(r.Ref), os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	hole, err := nextHole(f, 0, r.Size)
	if err != nil {
		return err
	}
	if err := s.restore(r.Ref, f); err != nil || hole == r.Size || !alone {
		return err
	}
	for hole < r.Size {
		end, err := nextData(f, hole, r.Size)
		if err != nil {
			return err
		}
		for hole < end {
			n := min(burst, end-hole)
			if err := s.fast.WaitN(ctx, int(n)); err != nil {
				return err
			}
			if _, err := f.WriteAt(zeros[:n], hole); err != nil {
				return fmt.Errorf("write blocks of region %s: %w", r.Ref, err)
			}
			hole += n
		}
		if hole, err = nextHole(f, hole, r.Size); err != nil {
			return err
		}
	}
	return f.Sync()
}

// restore cuts a region that its container has extended, and allocates what it has cut off or punched out, which is zeros now. f is its file, open for writing. It
// is safe while containers store into it. What is short of blocks is in Problems until that succeeds.
func (s *Store) restore(ref Ref, f *os.File) error {
	pool, err := s.restoreOnce(ref, f)
	if err != nil && len(pool) > 0 {
		s.giveUp(pool)
		_, err = s.restoreOnce(ref, f)
	}
	return err
}

// restoreOnce also takes all that waits out of the pool if NVM has no room.
func (s *Store) restoreOnce(ref Ref, f *os.File) (pool []string, err error) {
	s.mu.Lock() // so that the record is not about to say something else: see Resize
	defer s.mu.Unlock()
	r, ok := s.regs[ref.key()]
	if !ok || r.GrowTo != 0 || r.Kind == Snapshot {
		return nil, nil
	}
	if err := restoreFile(f, r); errors.Is(err, unix.ENOSPC) {
		st, serr := f.Stat()
		missing := r.Size
		if serr == nil {
			missing -= allocated(st)
		}
		err = fmt.Errorf("region %s of namespace %q: %d bytes that its container cut off or punched out have no blocks, and NVM has no room for them: make room there, then attach it, or run nhybridctl scm check --repair: %w",
			ref, ref.Namespace, max(missing, 0), errdefs.ErrResourceExhausted)
		s.short[ref.key()] = err
		return s.drainPool(), err
	} else if err != nil {
		return nil, fmt.Errorf("give region %s its size and blocks back: %w", ref, err)
	}
	delete(s.short, ref.key())
	return nil, nil
}

func restoreFile(f *os.File, r Record) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	hole, err := nextHole(f, 0, r.Size)
	if err != nil || st.Size() == r.Size && hole == r.Size {
		return err
	}
	entry := log.L.WithFields(log.Fields{"region": r.Ref.String(), "namespace": r.Namespace, "size": r.Size})
	if st.Size() != r.Size {
		entry.WithField("found", st.Size()).Warn("a region's file had another size: its container has extended or cut it; given its size back")
		err := f.Truncate(r.Size)
		if errors.Is(err, unix.EPERM) && clearFlags(f) == nil {
			err = f.Truncate(r.Size)
		}
		if err != nil {
			return err
		}
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, r.Size); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	// A hole may also be blocks that were not written yet.
	if now, err := f.Stat(); err == nil && allocated(now) > allocated(st) && st.Size() == r.Size {
		entry.WithField("bytes", allocated(now)-allocated(st)).Warn("a region's file had holes: its container has punched them; allocated again")
	}
	return nil
}

// allocated is how many bytes of a file have blocks. Some filesystems add those of its metadata.
func allocated(st os.FileInfo) int64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks * 512
	}
	return 0
}

// nextHole returns where the first bytes from off on are that have no blocks, or blocks that were never written; size if there are none.
func nextHole(f *os.File, off, size int64) (int64, error) {
	if off >= size {
		return size, nil
	}
	return seek(f, off, size, unix.SEEK_HOLE)
}

// nextData returns where a hole ends that begins at off.
func nextData(f *os.File, off, size int64) (int64, error) { return seek(f, off, size, unix.SEEK_DATA) }

func seek(f *os.File, off, size int64, whence int) (int64, error) {
	at, err := unix.Seek(int(f.Fd()), off, whence)
	switch {
	case errors.Is(err, unix.ENXIO) && whence == unix.SEEK_HOLE: // off lies behind the end: all from there on is missing
		return off, nil
	case errors.Is(err, unix.ENXIO):
		return size, nil
	case err != nil:
		return 0, fmt.Errorf("look for holes in %q: %w", f.Name(), err)
	}
	if st, err := f.Stat(); err == nil && at >= st.Size() && st.Size() < size {
		return st.Size(), nil
	}
	return min(at, size), nil
}

// clearFlags makes a file that is immutable or append-only an ordinary one (ioctl_iflags(2)). A container that has CAP_LINUX_IMMUTABLE can set them on its region.
func clearFlags(f *os.File) error {
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil && flags&(flagImmutable|flagAppend) != 0 {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags&^(flagImmutable|flagAppend)))
	}
	if err != nil {
		return fmt.Errorf("clear immutable flag of %q: %w", f.Name(), err)
	}
	return nil
}

// From linux/fs.h.
const (
	flagImmutable = 0x10 // FS_IMMUTABLE_FL
	flagAppend    = 0x20 // FS_APPEND_FL
)
