// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package parts keeps the touched parts of large files on NVM.
//
// The parts of an image are one more data-only layer of its containers' overlays, between NVM and the view: a small EROFS
// image on NVM in which each such file stands at its redirect. The file is chunk-based; its hot chunks lie in the image
// itself, all others in extra devices, which are the packs of the layers on HDD. The kernel reads both, nothing of ours is
// on the way. docs/hif.md says what was measured.
package parts

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Chunk is the unit in which a file is divided, in bytes: the grain of traces, and a block of EROFS, so that what a page
// fault reads need not touch the HDD for more than the page.
const Chunk = erofs.BlockSize

// MaxSize is the largest file that can be divided, in bytes: its index of chunks, 32 MiB then, is made in memory.
const MaxSize = 16 << 30

// Range is a part of a file, in bytes.
type Range struct{ Offset, Length int64 }

func (r Range) end() int64 { return r.Offset + r.Length }

// Want is a file of which a start is known to touch some ranges. They may come from a profile of a registry and need
// not make sense. No ranges at all: nothing of the file is touched.
type Want struct {
	Redirect string // as of [pack.Ref]
	Size     int64
	Ranges   []Range
}

// File is a file that is divided. Hot are its parts on NVM: aligned to [Chunk] but for the end of the file, ascending, with
// gaps between them.
type File struct {
	Redirect string
	Size     int64
	Hot      []Range
}

// Bytes is how much of NVM the file needs, without its metadata.
func (f *File) Bytes() (n int64) {
	for _, r := range f.Hot {
		n += r.Length
	}
	return n
}

// Saved is how much less of NVM the file needs than if it stood there whole.
func (f *File) Saved() int64 { return f.Size - f.Bytes() - overhead(f) }

// Cold is what of ranges, which are in order and do not touch, is not hot.
func (f *File) Cold(ranges []Range) (cold []Range) {
	for _, r := range ranges {
		at := r.Offset
		for _, h := range f.Hot {
			if h.end() <= at || h.Offset >= r.end() {
				continue
			}
			if h.Offset > at {
				cold = append(cold, Range{at, h.Offset - at})
			}
			at = h.end()
		}
		if at < r.end() {
			cold = append(cold, Range{at, r.end() - at})
		}
	}
	return cold
}

// overhead is the metadata of a file: inode, directory entries and entries of the list, index.
func overhead(f *File) int64 {
	return erofs.InodeSize + 3*int64(len(f.Redirect)) + chunks(f.Size)*8 + int64(len(f.Hot))*8
}

func chunks(size int64) int64 { return (size + Chunk - 1) / Chunk }

// Set is the divided files of an image, ordered by redirect.
type Set struct {
	Files []File
	// Margin is how many bytes are kept before and after each touched range, for the pages that the next start touches and
	// none did before: starts are not all alike.
	Margin int64
}

// margins are those to choose from, the largest first; the last is always allowed.
var margins = []int64{128 << 10, 64 << 10, 32 << 10, 16 << 10}

// ReadAhead is how far the kernel shall read ahead on the files: half of it before a page of a mapping that is missing and half
// behind (mm/filemap.c, do_sync_mmap_readahead), and twice as much behind the last page of a file that is read in sequence.
// With a quarter of the margin only hot chunks are read from any page in its inner half.
func (s *Set) ReadAhead() int64 { return s.Margin / 4 }

// Rules say which files are worth dividing. The zero value of a field means its default.
type Rules struct {
	MinSize  int64   // of the file: 256 KiB
	MinSaved int64   // bytes saved at least: 64 KiB
	MinShare float64 // of its bytes saved at least: 0.1
	MaxFiles int     // of one image: 4096
	// Spare is how many bytes margins may cost: the largest is taken that stays within it, or the smallest.
	Spare int64
}

func (r Rules) withDefaults() Rules {
	if r.MinSize <= 0 {
		r.MinSize = 256 << 10
	}
	if r.MinSaved <= 0 {
		r.MinSaved = 64 << 10
	}
	if r.MinShare <= 0 {
		r.MinShare = 0.1
	}
	if r.MaxFiles <= 0 {
		r.MaxFiles = maxFiles
	}
	return r
}

// Choose returns the files that are worth dividing, those that save most if they are too many, with the largest margin that
// the rules allow. What cannot be divided (no redirect, an impossible size, the same file twice) is not chosen. It is pure.
func Choose(wants []Want, r Rules) Set {
	r = r.withDefaults()
	seen := map[string]bool{}
	var able []Want
	for _, w := range wants {
		if _, err := pack.ParseRedirect(w.Redirect); err == nil && w.Size >= r.MinSize && w.Size <= MaxSize && !seen[w.Redirect] {
			seen[w.Redirect] = true
			able = append(able, w)
		}
	}
	_, most := r.choose(able, 0)
	var set Set
	for _, margin := range margins {
		var saved int64
		if set, saved = r.choose(able, margin); most-saved <= r.Spare {
			break
		}
	}
	return set
}

// choose takes the files that are worth dividing with a margin, and tells how many bytes they save.
func (r Rules) choose(wants []Want, margin int64) (set Set, saved int64) {
	set.Margin = margin
	for _, w := range wants {
		f := File{w.Redirect, w.Size, Hot(w.Size, w.Ranges, margin)}
		if n := f.Saved(); n >= r.MinSaved && float64(n) >= r.MinShare*float64(f.Size) {
			set.Files = append(set.Files, f)
		}
	}
	slices.SortStableFunc(set.Files, func(a, b File) int { return cmp.Compare(b.Saved(), a.Saved()) })
	set.Files = set.Files[:min(len(set.Files), r.MaxFiles)]
	for _, f := range set.Files {
		saved += f.Saved()
	}
	slices.SortFunc(set.Files, func(a, b File) int { return strings.Compare(a.Redirect, b.Redirect) })
	return set, saved
}

// Hot rounds touched ranges to chunks, with a margin on both sides, and joins them. What is outside the file is cut off.
func Hot(size int64, touched []Range, margin int64) []Range {
	var in []Range
	for _, r := range touched {
		if r.Offset < 0 || r.Length <= 0 || r.Offset >= size {
			continue
		}
		end := size
		if r.Length < size-r.Offset { // the sum may not fit
			end = r.end()
		}
		begin := max(r.Offset-min(margin, r.Offset), 0) / Chunk * Chunk
		if end = size - max(size-end-margin, 0); end < size {
			end = min((end+Chunk-1)/Chunk*Chunk, size)
		}
		in = append(in, Range{begin, end - begin})
	}
	slices.SortFunc(in, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var out []Range
	for _, r := range in {
		if len(out) > 0 && r.Offset <= out[len(out)-1].end() {
			last := &out[len(out)-1]
			last.Length = max(last.end(), r.end()) - last.Offset
			continue
		}
		out = append(out, r)
	}
	return out
}

// check refuses a set of which no image can be made.
func (s *Set) check() error {
	files := s.Files
	if s.Margin < 0 || s.Margin > MaxSize {
		return fmt.Errorf("a margin of %d bytes: %w", s.Margin, errdefs.ErrInvalidArgument)
	}
	if len(files) == 0 || len(files) > maxFiles {
		return fmt.Errorf("%d files, want 1 to %d: %w", len(files), maxFiles, errdefs.ErrInvalidArgument)
	}
	layers := map[uint64]bool{}
	for i, f := range files {
		ref, err := pack.ParseRedirect(f.Redirect)
		if err != nil {
			return err
		}
		layers[ref.Layer] = true
		if i > 0 && files[i-1].Redirect >= f.Redirect {
			return fmt.Errorf("%q is not in order: %w", f.Redirect, errdefs.ErrInvalidArgument)
		}
		if f.Size <= 0 || f.Size > MaxSize {
			return fmt.Errorf("%q has an impossible size, %d: %w", f.Redirect, f.Size, errdefs.ErrInvalidArgument)
		}
		end := int64(-1)
		for _, r := range f.Hot {
			if r.Offset <= end || r.Offset%Chunk != 0 || r.Length <= 0 || r.Length > f.Size-r.Offset || r.Length%Chunk != 0 && r.end() != f.Size {
				return fmt.Errorf("%q has an impossible range, %d bytes at %d: %w", f.Redirect, r.Length, r.Offset, errdefs.ErrInvalidArgument)
			}
			end = r.end()
		}
	}
	if len(layers) > maxPacks {
		return fmt.Errorf("files of %d layers, at most %d: %w", len(layers), maxPacks, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Bounds of our own; the format could hold 65 535 devices, and an image has at most 512 layers (package profile).
const (
	maxFiles = 4096
	maxPacks = 512
)
