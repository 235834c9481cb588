// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Resize makes a region larger that nobody has. A program that uses it by scmlib finds the new room in its heap.
func (s *Store) Resize(ctx context.Context, ref Ref, size int64) (Record, error) {
	release, err := s.hold(ctx, ref)
	if err != nil {
		return Record{}, err
	}
	defer release()
	r, err := s.Inspect(ref)
	if err == nil {
		err = inUse(r, "resize")
	}
	if err == nil {
		err = stream.CheckSize(size)
	}
	switch {
	case err != nil:
		return r, err
	case ref.Kind == Snapshot:
		return r, fmt.Errorf("resize %s: a snapshot stays as it is; clone it: %w", ref, errdefs.ErrInvalidArgument)
	case size < r.Size:
		return r, fmt.Errorf("resize %s to %s: it has %s and can only grow: %w", ref, FormatSize(size), FormatSize(r.Size), errdefs.ErrInvalidArgument)
	case size == r.Size:
		return r, nil
	}
	if err := s.restoreBlocks(ctx, r, true); err != nil {
		return r, err
	}
	promise, err := s.reserve(want{namespace: r.Owner(), size: size - r.Size})
	if err != nil {
		return r, fmt.Errorf("resize %s: %w", ref, err)
	}
	defer promise.release()
	r.GrowTo = size
	if err := writeMeta(s.dir(ref), r); err != nil {
		return r, err
	}
	promise.kept(func() { s.regs[r.key()] = r }) // it is in the books by GrowTo
	s.step("grow: intent")
	if err := s.growData(ctx, s.data(ref), r.Size, size); err != nil {
		return r, errors.Join(fmt.Errorf("resize %s: %w", ref, err), s.cutBack(r))
	}
	s.step("grow: grown")
	r.Size, r.GrowTo = size, 0
	return r, s.update(r)
}

// cutBack undoes growth that failed.
func (s *Store) cutBack(r Record) error {
	f, err := openData(s.data(r.Ref), os.O_RDWR)
	if err == nil {
		err = errors.Join(f.Truncate(r.Size), f.Close())
	}
	if err == nil {
		r.GrowTo = 0
		err = s.update(r)
	}
	return err
}

// finishGrow does again, or undoes, growth that a crash has cut short.
func (s *Store) finishGrow(r Record) error {
	path := s.data(r.Ref)
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	ok, err := formatted(path)
	if err != nil {
		return err
	}
	if st.Size() == r.GrowTo && ok {
		// The header is written last. With it, all is done.
		if region, err := scmlib.Open(path, scmlib.Options{ReadOnly: true, AcceptUnsafe: true}); err == nil {
			r.Size, r.GrowTo = r.GrowTo, 0
			return errors.Join(region.Close(), s.update(r))
		}
	}
	return s.cutBack(r)
}

// growData makes the file of a region larger, and the region in it.
func (s *Store) growData(ctx context.Context, path string, from, to int64) error {
	extend := func(f *os.File) error {
		if err := unix.Fallocate(int(f.Fd()), 0, from, to-from); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("allocate %d bytes: %w", to-from, err)
		}
		for at := from; at < to; at += burst {
			n := min(burst, to-at)
			if err := s.slow.WaitN(ctx, int(n)); err != nil {
				return err
			}
			if _, err := f.WriteAt(zeros[:n], at); err != nil {
				return fmt.Errorf("write %d bytes at %d: %w", n, at, err)
			}
			s.step("grow: some")
		}
		return f.Sync()
	}
	ok, err := formatted(path)
	if err != nil {
		return err
	}
	if ok {
		return unlocked(func() error { return scmlib.Grow(path, to, extend) })
	}
	f, err := openData(path, os.O_RDWR)
	if err != nil {
		return err
	}
	return errors.Join(extend(f), f.Close())
}

// Report is what Check found.
type Report struct {
	Ref         Ref      `json:"ref"`
	Size        int64    `json:"size"`
	Allocated   int64    `json:"allocated"` // bytes that have blocks
	Used        int64    `json:"used"`      // bytes in blocks that are not zero
	Formatted   bool     `json:"formatted"` // by scmlib; of other regions no more can be told
	Layout      string   `json:"layout,omitempty"`
	UUID        string   `json:"uuid,omitempty"`
	Parent      string   `json:"parent,omitempty"`
	Generation  uint64   `json:"generation,omitempty"`
	HeaderBad   bool     `json:"header_bad"` // one copy of the header is damaged: the next open heals it
	Pending     int      `json:"pending"`    // transactions that the next open rolls back
	Repaired    bool     `json:"repaired"`   // both was done now
	HeapBlocks  int64    `json:"heap_blocks"`
	HeapBytes   int64    `json:"heap_bytes"`
	HeapFree    uint64   `json:"heap_free"` // bytes in free chunks
	Problems    []string `json:"problems,omitempty"`
	ContainerOn bool     `json:"in_use"`
}

// Check examines a region: its file, both copies of its header, its log, and each block of its heap. One that is in use is examined in a copy. With
// repair one that is not in use gets its blocks back, and is opened as a program would, which heals and recovers it.
func (s *Store) Check(ctx context.Context, ref Ref, repair bool) (Report, error) {
	rep := Report{Ref: ref}
	r, err := s.Inspect(ref)
	if err != nil {
		return rep, err
	}
	rep.Size, rep.ContainerOn = r.Size, len(r.Users) > 0
	path := s.data(ref)
	if repair || !rep.ContainerOn {
		release, err := s.hold(ctx, ref)
		if err != nil {
			return rep, err
		}
		defer release()
		if r, err = s.Inspect(ref); err == nil {
			err = inUse(r, "check")
		}
		if err != nil {
			return rep, err
		}
		if repair && ref.Kind == Snapshot {
			return rep, fmt.Errorf("repair %s: a snapshot stays as it is; clone it: %w", ref, errdefs.ErrInvalidArgument)
		}
	}
	var short error
	if repair {
		if short = s.restoreBlocks(ctx, r, true); short != nil && !errdefs.IsResourceExhausted(short) {
			return rep, short
		}
	}
	err = s.checkFile(&rep, r)
	if short != nil && len(rep.Problems) == 0 {
		rep.Problems = append(rep.Problems, short.Error())
	}
	if err != nil || !rep.ContainerOn && !rep.Formatted {
		return rep, err
	}
	if rep.ContainerOn {
		i, err := s.Take(ctx, ref, nil)
		if err != nil {
			return rep, err
		}
		defer i.Close()
		if rep.Formatted = hasMagic(i.f); !rep.Formatted {
			return rep, nil
		}
		path = fmt.Sprintf("/proc/self/fd/%d", i.f.Fd())
	}
	return rep, rep.checkHeap(path, repair)
}

func (s *Store) checkFile(rep *Report, r Record) error {
	f, err := openData(s.data(r.Ref), os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("look at region: %w", err)
	}
	rep.Allocated, rep.Formatted = st.Blocks*512, hasMagic(f)
	if st.Size != r.Size {
		rep.Problems = append(rep.Problems, fmt.Sprintf("its file has %d bytes, not %d", st.Size, r.Size))
	}
	if missing := r.Size - rep.Allocated; missing > 0 && r.Kind != Snapshot {
		rep.Problems = append(rep.Problems, fmt.Sprintf("%d bytes have no blocks: a store there fails when NVM is full", missing))
	}
	rep.Used, err = count(usedOf(f, r.Size))
	return err
}

func (rep *Report) checkHeap(path string, repair bool) error {
	var region *scmlib.Region
	err := unlocked(func() (err error) {
		region, err = scmlib.Open(path, scmlib.Options{ReadOnly: !repair, AcceptUnsafe: true})
		return err
	})
	if err != nil {
		rep.Problems = append(rep.Problems, err.Error())
		return nil
	}
	i := region.Info()
	rep.Layout, rep.UUID, rep.Parent, rep.Generation = i.Layout, i.UUID, i.Parent, i.Generation
	rep.HeaderBad, rep.Pending, rep.Repaired = i.Healed, i.Recovered, repair
	rep.HeapFree = region.Free()
	err = region.View(func() error {
		region.Blocks(func(b scmlib.Block) bool { rep.HeapBlocks++; rep.HeapBytes += int64(b.Size); return true })
		return nil
	})
	if err != nil {
		rep.Problems = append(rep.Problems, err.Error())
	}
	return region.Close()
}
