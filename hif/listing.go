// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Listing is the files of one image. It does not change, and may be used by
// several goroutines. It implements [profile.Listing]: a file is known by its
// first name in the layer that holds it; for all but hard links and files of
// renamed directories that is its path in the image, too.
type Listing struct {
	image   Image
	layers  map[uint64]int // places in the chain by id, of one that is there twice the lower
	entries []listed       // ascending by layer and number
	byPath  []int32        // entries by path; of one path, those that containers see there first
	others  []other        // visible paths that differ from the path in the layer, ascending
	bytes   int64          // of the files
	memory  int64          // about what the listing takes, in bytes
}

// listed is a file. There are many: 32 bytes and the path.
type listed struct {
	path   string
	size   int64
	number uint32
	layer  uint16
	seen   bool // containers see it at its path
}

type other struct {
	path  string
	entry int32
}

// list reads the files of an image.
func list(ctx context.Context, s Store, image Image) (*Listing, error) {
	l := &Listing{image: image, layers: map[uint64]int{}}
	for i, id := range image.Chain {
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil || i > math.MaxUint16 {
			return nil, fmt.Errorf("list files of view %s: layer %d of its chain has the id %q: %w", image.View, i, id, errdefs.ErrInvalidArgument)
		}
		if _, twice := l.layers[n]; !twice {
			l.layers[n] = i
		}
	}
	type name struct {
		path string
		ref  pack.Ref
	}
	var others []name
	at := map[pack.Ref]int{}
	err := s.Files(ctx, image, func(f File) bool {
		ref, err := pack.ParseRedirect(f.Redirect)
		layer, known := l.layers[ref.Layer]
		p := profile.Path(f.InLayer)
		if err != nil || !known || f.Size <= 0 || p.Check() != nil {
			return true
		}
		i, again := at[ref]
		if !again {
			i = len(l.entries)
			at[ref] = i
			l.entries = append(l.entries, listed{path: strings.Clone(f.InLayer), size: f.Size, number: ref.Number, layer: uint16(layer)})
			l.bytes += f.Size
			l.memory += int64(len(f.InLayer)) + 40
		}
		if f.Path == "/"+f.InLayer {
			l.entries[i].seen = true
		} else {
			others = append(others, name{strings.Clone(f.Path), ref})
			l.memory += int64(len(f.Path)) + 24
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list files of view %s: %w", image.View, err)
	}
	slices.SortFunc(l.entries, func(a, b listed) int {
		return cmp.Or(cmp.Compare(a.layer, b.layer), cmp.Compare(a.number, b.number))
	})
	l.byPath = make([]int32, len(l.entries))
	for i := range l.byPath {
		l.byPath[i] = int32(i)
	}
	slices.SortStableFunc(l.byPath, func(a, b int32) int {
		x, y := &l.entries[a], &l.entries[b]
		if c := strings.Compare(x.path, y.path); c != 0 || x.seen == y.seen {
			return c
		}
		if x.seen {
			return -1
		}
		return 1
	})
	for _, o := range others {
		i, _ := l.at(o.ref)
		l.others = append(l.others, other{o.path, int32(i)})
	}
	slices.SortFunc(l.others, func(a, b other) int { return strings.Compare(a.path, b.path) })
	return l, nil
}

func (l *Listing) entry(i int) profile.Entry {
	e := &l.entries[i]
	return profile.Entry{Path: profile.Path(e.path), Layer: int(e.layer), Size: e.size}
}

// at is the place of a data file among the entries.
func (l *Listing) at(ref pack.Ref) (int, bool) {
	layer, ok := l.layers[ref.Layer]
	if !ok {
		return 0, false
	}
	return slices.BinarySearchFunc(l.entries, listed{layer: uint16(layer), number: ref.Number}, func(a, b listed) int {
		return cmp.Or(cmp.Compare(a.layer, b.layer), cmp.Compare(a.number, b.number))
	})
}

// from is the place in byPath of the first entry with a path.
func (l *Listing) from(p profile.Path) int {
	i, _ := slices.BinarySearchFunc(l.byPath, string(p), func(i int32, p string) int { return strings.Compare(l.entries[i].path, p) })
	return i
}

// Lookup implements [profile.Listing].
func (l *Listing) Lookup(p profile.Path) (profile.Entry, bool) {
	i := l.from(p)
	if i == len(l.byPath) || l.entries[l.byPath[i]].path != string(p) {
		return profile.Entry{}, false
	}
	return l.entry(int(l.byPath[i])), true
}

// All implements [profile.Listing].
func (l *Listing) All(yield func(profile.Entry) bool) {
	for _, i := range l.byPath {
		if !yield(l.entry(int(i))) {
			return
		}
	}
}

// visible finds a file by its path in the image, absolute or relative to the root.
func (l *Listing) visible(name string) (profile.Entry, bool) {
	name = path.Join("/", name)
	if i, ok := slices.BinarySearchFunc(l.others, name, func(o other, name string) int { return strings.Compare(o.path, name) }); ok {
		return l.entry(int(l.others[i].entry)), true
	}
	return l.Lookup(profile.Path(name[1:]))
}

// ref is the data file that a profile means by a layer and a path.
func (l *Listing) ref(k fileKey) (pack.Ref, bool) {
	if k.layer < 0 || k.layer >= len(l.image.Chain) {
		return pack.Ref{}, false
	}
	id, _ := strconv.ParseUint(l.image.Chain[k.layer], 10, 64) // list has checked it
	for _, i := range l.byPath[l.from(k.path):] {
		e := &l.entries[i]
		if e.path != string(k.path) {
			break
		}
		if int(e.layer) == l.layers[id] {
			return pack.Ref{Layer: id, Number: e.number}, true
		}
	}
	return pack.Ref{}, false
}

// find is a data file as profiles and containers know it.
func (l *Listing) find(ref pack.Ref) (named, bool) {
	i, ok := l.at(ref)
	if !ok {
		return named{}, false
	}
	n := named{Entry: l.entry(i)}
	if l.entries[i].seen {
		n.shown = "/" + string(n.Path)
	} else if j := slices.IndexFunc(l.others, func(o other) bool { return int(o.entry) == i }); j >= 0 {
		n.shown = l.others[j].path
	}
	return n, true
}
