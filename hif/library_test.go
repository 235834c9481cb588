// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// shelves is a Store that counts how often images are listed.
type shelves struct {
	Store
	files map[string][]File // by view
	lists map[string]int
	err   error
}

func (s *shelves) Files(_ context.Context, i Image, yield func(File) bool) error {
	s.lists[i.View]++
	for _, f := range s.files[i.View] {
		if !yield(f) {
			break
		}
	}
	return s.err
}

func newShelves(views ...string) *shelves {
	s := &shelves{files: map[string][]File{}, lists: map[string]int{}}
	for _, view := range views {
		for i := range 100 {
			path := fmt.Sprint("usr/lib/", view, "/", i)
			s.files[view] = append(s.files[view], File{"/" + path, path, pack.Ref{Layer: 7, Number: uint32(i + 1)}.Redirect(), 10})
		}
	}
	return s
}

func view(name string) Image { return Image{View: name, Chain: []string{"7"}} }

// Listings are kept within a bound, those used last.
func TestListingsThatAreKept(t *testing.T) {
	s := newShelves("1", "2", "3")
	l := newLibrary(s)
	read := func(name string, lists int) {
		t.Helper()
		files, err := l.listing(t.Context(), view(name))
		require.NoError(t, err)
		require.EqualValues(t, 1000, files.bytes)
		require.Equal(t, lists, s.lists[name])
		var sum int64
		for _, o := range l.listings {
			sum += o.memory
		}
		require.LessOrEqual(t, sum, l.memory)
	}
	read("1", 1)
	l.memory = 2*l.listings[0].memory + 100
	read("2", 1)
	read("1", 1)
	read("3", 1)
	read("1", 1)
	read("2", 2)
	read("3", 2)
	l.keep([]Image{view("3")})
	read("3", 2)
	require.Len(t, l.listings, 1)
	l.memory = 10 // one that is too large is read and not kept
	read("1", 2)
	read("1", 3)
	l.memory = listingMemory
	read("1", 4)
	// What has another chain is another view, though it has the same name.
	files, err := l.listing(t.Context(), Image{View: "1", Chain: []string{"8"}})
	require.NoError(t, err)
	require.Zero(t, files.bytes)
	require.Len(t, l.listings, 1)
	s.err = errors.New("damaged")
	_, err = l.listing(t.Context(), view("9"))
	require.ErrorIs(t, err, s.err)
}

// Names that were asked for are known without another listing.
func TestNames(t *testing.T) {
	s := newShelves("1", "2")
	l := newLibrary(s)
	l.memory = 0
	key := func(i int) fileKey { return fileKey{0, profile.Path(fmt.Sprint("usr/lib/1/", i))} }
	ref := func(i int) pack.Ref { return pack.Ref{Layer: 7, Number: uint32(i + 1)} }
	for range 2 {
		refs, err := l.refs(t.Context(), view("1"), []fileKey{key(3), {0, "missing"}, key(5)})
		require.NoError(t, err)
		require.Equal(t, []pack.Ref{ref(3), {}, ref(5)}, refs)
		require.Equal(t, 1, s.lists["1"])
	}
	require.Equal(t, "/usr/lib/1/3", l.shown("1", ref(3)))
	require.Empty(t, l.shown("1", ref(4)))
	require.Empty(t, l.shown("2", ref(3)))
	for range 2 {
		found, err := l.find(t.Context(), view("1"), []pack.Ref{ref(5), ref(6), ref(1000)})
		require.NoError(t, err)
		require.Len(t, found, 2)
		require.Equal(t, named{profile.Entry{Path: key(6).path, Size: 10}, "/usr/lib/1/6"}, found[ref(6)])
		require.Equal(t, 2, s.lists["1"])
	}
	refs, err := l.refs(t.Context(), view("1"), []fileKey{key(6)})
	require.NoError(t, err)
	require.Equal(t, []pack.Ref{ref(6)}, refs)
	require.Equal(t, 2, s.lists["1"], "it was found the other way round")
	refs, err = l.refs(t.Context(), view("2"), nil)
	require.NoError(t, err)
	require.Empty(t, refs)
	require.Zero(t, s.lists["2"], "nothing was asked")
	l.keep([]Image{view("2")})
	require.Empty(t, l.names)
}

func TestHotFilesOfAnImage(t *testing.T) {
	s := newShelves("1")
	l := newLibrary(s)
	l.memory = 0
	p := profile.New(profile.Image{}, time.Now())
	for _, path := range []profile.Path{"usr/lib/1/3", "gone", "usr/lib/1/5"} {
		p.Files = append(p.Files, profile.File{Path: path, Weight: 1})
	}
	redirects := func() (out []string) {
		t.Helper()
		hot, err := l.hot(t.Context(), view("1"), &p)
		require.NoError(t, err)
		for _, h := range hot {
			out = append(out, h.Redirect)
		}
		return out
	}
	for range 2 {
		require.Equal(t, []string{"/7/04/4", "/7/06/6"}, redirects())
	}
	require.Equal(t, 1, s.lists["1"])
	require.NoError(t, p.Set(profile.Rule{Glob: "usr/lib/1/9?", Action: profile.Pin}, time.Now()))
	require.Len(t, redirects(), 12)
	require.Equal(t, 2, s.lists["1"])
	require.Len(t, l.names["1"].files, 2, "what is pinned is not kept")
	s.err = errors.New("damaged")
	_, err := l.hot(t.Context(), view("1"), &p)
	require.ErrorIs(t, err, s.err)
}
