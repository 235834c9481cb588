// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Ageing decides when a file leaves a profile.
type Ageing struct {
	// Unused: it leaves when so many complete starts in a row did not use it.
	Unused int
	// Share is what one start counts in the moving average that is a file's
	// weight, 0 to 1.
	Share float64
	// MinWeight: below it the file leaves.
	MinWeight float64
}

// DefaultAgeing forgets a file that every start used after ten that do not, and
// one that a single start among many used after seven.
var DefaultAgeing = Ageing{Unused: 10, Share: 0.2, MinWeight: 0.05}

// Stays decides whether a file stays in a profile of so many complete starts.
func (a Ageing) Stays(f File, starts int) bool {
	return starts-f.LastStart < a.Unused && f.Weight >= a.MinWeight
}

// after is a file's weight after one more start.
func (a Ageing) after(weight float64, used bool) float64 {
	weight *= 1 - a.Share
	if used {
		weight += a.Share
	}
	return min(weight, 1)
}

// Merge adds a start to a profile. What an incomplete start did not use does
// not age. The order is that of the new start; files it did not use keep their
// place behind the file they used to follow.
func Merge(p Profile, s Start, a Ageing) Profile {
	first := p.Starts == 0 && p.Inherited == ""
	if s.Complete {
		p.Starts++
	} else {
		p.Incomplete++
	}
	p.Updated = s.At.UTC()
	old := make(map[Path]File, len(p.Files))
	for _, f := range p.Files {
		old[f.Path] = f
	}
	used := make(map[Path]bool, len(s.Files))
	var files []File
	for _, u := range s.Files {
		if used[u.Path] {
			continue
		}
		used[u.Path] = true
		f, known := old[u.Path]
		if known && f.same(u.Entry, p.Layers, p.Layers) {
			f.Weight = a.after(f.Weight, true)
			f.observe(u)
		} else {
			f = File{Path: u.Path, Layer: u.Layer, Size: u.Size, Digest: u.Digest, Kind: u.Kind,
				Weight: a.after(0, true), Touched: u.Touched, Ranges: slices.Clone(u.Ranges)}
			if first {
				f.Weight = 1
			}
		}
		f.Starts++
		f.LastStart = p.Starts
		files = append(files, f)
	}
	var follow string // key of the file that the next unused one stands behind
	behind := map[string][]File{}
	for _, f := range p.Files {
		if used[f.Path] {
			follow = "/" + string(f.Path) // no path begins so: "" is the beginning
			continue
		}
		if s.Complete {
			f.Weight = a.after(f.Weight, false)
			if !a.Stays(f, p.Starts) {
				continue
			}
		}
		behind[follow] = append(behind[follow], f)
	}
	p.Files = slices.Clone(behind[""])
	for _, f := range files {
		p.Files = append(p.Files, f)
		p.Files = append(p.Files, behind["/"+string(f.Path)]...)
	}
	return p
}

// same tells whether an entry is, for all that is known, the file of f.
func (f File) same(e Entry, fl, el []digest.Digest) bool {
	if f.Size != e.Size {
		return false
	}
	if f.Digest != "" && e.Digest != "" {
		return f.Digest == e.Digest
	}
	return inRange(fl, f.Layer) && inRange(el, e.Layer) && fl[f.Layer] == el[e.Layer]
}

func inRange(layers []digest.Digest, i int) bool { return i >= 0 && i < len(layers) }

// observe adds what another start did with the file.
func (f *File) observe(u Use) {
	f.Kind = stronger(f.Kind, u.Kind)
	if f.Digest == "" {
		f.Digest = u.Digest
	}
	switch {
	case u.Touched < 0:
	case f.Touched < 0:
		f.Touched, f.Ranges = u.Touched, slices.Clone(u.Ranges)
	default:
		f.Ranges = union(f.Ranges, u.Ranges)
		f.Touched = min(f.Size, max(f.Touched, u.Touched))
	}
}

// stronger: what was once executed is a program, whoever else reads it.
func stronger(a, b Kind) Kind {
	rank := func(k Kind) int { return slices.Index([]Kind{Read, Library, Exec}, k) }
	if rank(b) > rank(a) {
		return b
	}
	return a
}

// union is the ranges that are in a or in b, in order; at most [MaxRanges],
// beyond which the smallest gaps are closed.
func union(a, b []Range) []Range {
	all := append(slices.Clone(a), b...)
	slices.SortFunc(all, func(x, y Range) int { return cmp.Compare(x.Offset, y.Offset) })
	all = joined(all, 0)
	for gap := int64(4096); len(all) > MaxRanges; gap *= 2 {
		all = joined(all, gap)
	}
	return all
}

func joined(sorted []Range, gap int64) []Range {
	var out []Range
	for _, r := range sorted {
		if n := len(out); n > 0 && r.Offset <= out[n-1].Offset+out[n-1].Length+gap {
			out[n-1].Length = max(out[n-1].Length, r.Offset+r.Length-out[n-1].Offset)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// Confidence of an inherited file: what its weight is multiplied by.
const (
	sameContent = 1.0 // same digest, or the same layer
	sameSize    = 0.8 // at the same path, of the same size
	samePath    = 0.5 // at the same path
)

// Inherit makes the first profile of an image from that of another version. A
// file is found again by its path, or, where that is gone, by its content. What
// is not sure to be the same counts less and leaves sooner; ranges are kept only
// where the content is the same.
func Inherit(old Profile, image Image, files Listing) Profile {
	p := New(image, old.Updated)
	p.Inherited = old.Image
	p.Rules = slices.Clone(old.Rules)
	taken := map[Path]bool{}
	var byContent map[digest.Digest]Entry
	for _, f := range old.Files {
		e, ok := files.Lookup(f.Path)
		factor := samePath
		switch {
		case !ok && f.Digest == "":
			continue
		case !ok:
			if byContent == nil {
				byContent = contents(files)
			}
			if e, ok = byContent[f.Digest]; !ok || e.Size != f.Size {
				continue
			}
			factor = sameContent
		case f.same(e, old.Layers, image.Layers):
			factor = sameContent
		case f.Size == e.Size && (f.Digest == "" || e.Digest == ""):
			factor = sameSize
		}
		if taken[e.Path] {
			continue
		}
		taken[e.Path] = true
		g := File{Path: e.Path, Layer: e.Layer, Size: e.Size, Digest: e.Digest, Kind: f.Kind,
			Weight: f.Weight * factor, Touched: -1}
		if factor == sameContent {
			g.Touched, g.Ranges = f.Touched, slices.Clone(f.Ranges)
			g.Digest = cmp.Or(e.Digest, f.Digest)
		}
		p.Files = append(p.Files, g)
	}
	return p
}

func contents(files Listing) map[digest.Digest]Entry {
	m := map[digest.Digest]Entry{}
	for e := range files.All {
		if e.Digest != "" {
			if _, twice := m[e.Digest]; !twice {
				m[e.Digest] = e
			}
		}
	}
	return m
}
