// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"debug/elf"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

const (
	// RangeGrain is the grain of [File.Ranges] in bytes: the page of most hosts.
	RangeGrain = 4 << 10
	// rangesFrom is the size of files above which ranges are listed.
	rangesFrom = 64 << 10
	// maxRanges bounds the ranges of one file; beyond it neighbours are joined.
	maxRanges = 512
	// coldBytes: a file of which no more was in the page cache when its first
	// open was seen counts as cold. Of others it cannot be told what was there
	// before: the reader looks a moment after the open, and a start on fast
	// storage brings in megabytes in that moment. What was there is counted as
	// touched therefore, so that the figure errs towards too much, unless it is
	// plain that others put it there.
	coldBytes = 256 << 10
)

// measure completes the records of a start that is over: kinds of use, and what
// the page cache holds of the files. It opens them by the data root and clones of
// the images' mounts, which the group ignores, and reads nothing that is not
// cached. An inode of an image has a page cache of its own, beside that of the
// pack in which its bytes are: it holds what containers of this chain have read.
func (w *Watch) measure(files []File) {
	for i := range files {
		f := &files[i]
		warm := f.Touched
		f.Touched = -1
		dir := w.t.root.fd
		switch {
		case f.image == nil:
		case f.image == w.home || f.image == w.parts:
			dir = f.image.fd
		default:
			continue // parts that were replaced before the container was mounted
		}
		name := f.Redirect()[1:]
		fd, err := openRegular(dir, name)
		if err != nil && f.image == nil {
			// It left NVM in the meantime; the pages it was read into are gone.
			warm = -1
			fd, err = openRegular(w.home.fd, name)
		}
		if err != nil {
			continue
		}
		if warm >= 0 {
			f.Touched, f.Ranges = touched(fd, f.Size, warm, f.evicted)
		}
		if f.Kind == Read && isSharedObject(fd) {
			f.Kind = Library
		}
		unix.Close(fd)
	}
}

// touched asks the page cache what it holds of a file. warm and before are what
// it held, and what it had evicted, when the first open was seen.
func touched(fd int, size, warm, before int64) (int64, []Range) {
	var st unix.Statx_t
	if err := statx(fd, &st); err != nil || int64(st.Size) != size || st.Attributes&unix.STATX_ATTR_DAX != 0 {
		return -1, nil // on DAX nothing is cached whatever is read
	}
	// Where nothing had been evicted before, what is now was read by this start:
	// hosts that reclaim what is not used (DAMON, memory.reclaim) are quick to.
	// Else it cannot be told what was evicted when.
	used := func(off, length int64) (int64, int64, error) {
		in, evicted, err := cached(fd, off, length)
		if before == 0 {
			return in + evicted, 0, err
		}
		return in, evicted, err
	}
	n, evicted, err := used(0, 0)
	// Less than at first sight: somebody dropped the cache meanwhile.
	if err != nil || evicted > before || n < warm {
		return -1, nil
	}
	n = min(n, size)
	// All of a file is cached when it was unpacked or copied lately, and when a
	// start reads it all; and some of it when it was and memory was short.
	if warm > coldBytes && (before > 0 || n > size/10*9) {
		return -1, nil
	}
	if n == 0 || size <= rangesFrom {
		return n, nil
	}
	if n == size {
		return n, []Range{{0, size}}
	}
	var ranges []Range
	// Asked for halves, and their halves where they are cached in part: most of a large file is not cached at all.
	var look func(off, length int64) bool
	look = func(off, length int64) bool {
		in, _, err := used(off, min(length, size-off))
		switch {
		case err != nil:
			return false
		case in == 0:
		case length > RangeGrain && in < min(length, size-off):
			half := length / 2
			return look(off, half) && (off+half >= size || look(off+half, half))
		case len(ranges) > 0 && ranges[len(ranges)-1].end() == off:
			ranges[len(ranges)-1].Length += min(length, size-off)
		default:
			ranges = append(ranges, Range{off, min(length, size-off)})
		}
		return true
	}
	for off := int64(0); off < size; off += rangesFrom {
		if !look(off, rangesFrom) {
			return n, nil
		}
	}
	return n, join(ranges, maxRanges)
}

func (r Range) end() int64 { return r.Offset + r.Length }

// join closes the smallest gaps until no more than limit ranges are left.
func join(ranges []Range, limit int) []Range {
	for gap := int64(RangeGrain); len(ranges) > limit; gap *= 2 {
		out := ranges[:1]
		for _, r := range ranges[1:] {
			if last := &out[len(out)-1]; r.Offset-last.end() <= gap {
				last.Length = r.end() - last.Offset
			} else {
				out = append(out, r)
			}
		}
		ranges = out
	}
	return ranges
}

// isSharedObject looks at the ELF header, if it is in the page cache: who
// mapped the file has read it. The cache is asked first, since a read with
// RWF_NOWAIT starts the read-ahead of what is not there. On DAX there is none.
func isSharedObject(fd int) bool {
	if in, _, err := cached(fd, 0, 1); !errors.Is(err, errDAX) && (err != nil || in == 0) {
		return false
	}
	var head [18]byte
	n, err := unix.Preadv2(fd, [][]byte{head[:]}, 0, unix.RWF_NOWAIT)
	if err != nil || n < len(head) || string(head[:4]) != elf.ELFMAG {
		return false
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	return elf.Type(order.Uint16(head[16:])) == elf.ET_DYN
}
