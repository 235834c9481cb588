// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

func TestCovers(t *testing.T) {
	r := func(pairs ...int64) (all []parts.Range) {
		for i := 0; i < len(pairs); i += 2 {
			all = append(all, parts.Range{Offset: pairs[i], Length: pairs[i+1]})
		}
		return all
	}
	covers := func(stands, wanted []parts.Range) bool { return len((&parts.File{Hot: stands}).Cold(wanted)) == 0 } // as served asks
	require.True(t, covers(r(0, 10, 20, 10), r(0, 10, 22, 3)))
	require.True(t, covers(r(0, 10), nil))
	require.False(t, covers(r(0, 10, 20, 10), r(0, 11)))
	require.False(t, covers(r(0, 10, 20, 10), r(5, 20)), "the gap is not there")
	require.False(t, covers(nil, r(0, 1)))
}

func TestMerge(t *testing.T) {
	one, two := profile.Range{Offset: 0, Length: 5}, profile.Range{Offset: 9, Length: 5}
	got := merge([]parts.Want{
		want("/1/a", 100, []profile.Range{one}), want("/1/b", 100, []profile.Range{one}), want("/1/a", 100, []profile.Range{two}),
	})
	require.Equal(t, []parts.Want{
		{Redirect: "/1/a", Size: 100, Ranges: []parts.Range{{Offset: 0, Length: 5}, {Offset: 9, Length: 5}}},
		{Redirect: "/1/b", Size: 100, Ranges: []parts.Range{{Offset: 0, Length: 5}}},
	}, got)
}

func TestForgettable(t *testing.T) {
	var gone []remembered
	for i := range 5 {
		gone = append(gone, remembered{digest.Digest(fmt.Sprint("a", i)), "a", time.Unix(int64(i), 0)})
	}
	gone = append(gone, remembered{"b", "b", time.Unix(0, 0)})
	require.ElementsMatch(t, []digest.Digest{"a0", "a1"}, forgettable(gone))
	gone = nil
	for i := range keepInAll + 2 {
		gone = append(gone, remembered{digest.Digest(fmt.Sprint(i)), fmt.Sprint(i), time.Unix(int64(i), 0)})
	}
	require.ElementsMatch(t, []digest.Digest{"0", "1"}, forgettable(gone))
}

// files is a Store that knows files only.
type files struct {
	Store
	all []File
}

func (f files) Files(_ context.Context, _ Image, yield func(File) bool) error {
	for _, x := range f.all {
		if !yield(x) {
			break
		}
	}
	return nil
}

// A hard link is known by the first name of its file in the layer.
func TestListing(t *testing.T) {
	image := Image{View: "12", Chain: []string{"7", "8", "7", "11"}}
	f := func(path, inLayer, redirect string, size int64) File { return File{path, inLayer, redirect, size} }
	l, err := list(t.Context(), files{all: []File{
		f("/bin/a", "bin/a", "/7/02/2", 10),
		f("/bin/b", "bin/a", "/7/02/2", 10),              // a hard link
		f("/both", "both", "/8/01/1", 5),                 //
		f("/etc/empty", "etc/empty", "/8/05/5", 0),       // no data
		f("/etc/foreign", "etc/foreign", "/9/01/1", 10),  // of no layer of the image
		f("/etc/stray", "etc/stray", "/7/etc/stray", 10), // no data file
		f("/last", "first", "/8/2c/300", 7),              // a hard link, of which the first name is hidden
		f("/new/both", "both", "/7/03/3", 6),             // hidden, but for a copy of its directory
		f("/new/c", "old/c", "/7/01/1", 20),              // of a directory that was renamed in a container
	}}, image)
	require.NoError(t, err)
	a := profile.Entry{Path: "bin/a", Size: 10}
	c := profile.Entry{Path: "old/c", Size: 20}
	first := profile.Entry{Path: "first", Layer: 1, Size: 7}
	both, hidden := profile.Entry{Path: "both", Layer: 1, Size: 5}, profile.Entry{Path: "both", Size: 6}
	for name, want := range map[string]profile.Entry{
		"/bin/a": a, "bin/a": a, "/bin/b": a, "/new/c": c, "/last": first, "/both": both, "new/both": hidden,
	} {
		got, ok := l.visible(name)
		require.True(t, ok, name)
		require.Equal(t, want, got, name)
	}
	for _, name := range []profile.Path{"bin/b", "new/c", "", "zzz"} {
		_, ok := l.Lookup(name)
		require.False(t, ok, name)
	}
	got, ok := l.Lookup("both")
	require.True(t, ok)
	require.Equal(t, both, got, "what containers see there")
	var all []profile.Entry
	l.All(func(e profile.Entry) bool { all = append(all, e); return true })
	require.Equal(t, []profile.Entry{a, both, hidden, first, c}, all)
	require.EqualValues(t, 48, l.bytes)

	for ref, want := range map[pack.Ref]named{
		{Layer: 7, Number: 2}: {a, "/bin/a"}, {Layer: 7, Number: 1}: {c, "/new/c"}, {Layer: 8, Number: 300}: {first, "/last"},
		{Layer: 8, Number: 1}: {both, "/both"}, {Layer: 7, Number: 3}: {hidden, "/new/both"},
	} {
		got, ok := l.find(ref)
		require.True(t, ok)
		require.Equal(t, want, got)
		back, ok := l.ref(fileKey{want.Layer, want.Path})
		require.True(t, ok)
		require.Equal(t, ref, back)
		if want.Layer == 0 {
			back, ok = l.ref(fileKey{2, want.Path}) // the same layer
			require.True(t, ok)
			require.Equal(t, ref, back)
		}
	}
	for _, ref := range []pack.Ref{{}, {Layer: 7, Number: 4}, {Layer: 9, Number: 1}, {Layer: 11, Number: 1}} {
		_, ok := l.find(ref)
		require.False(t, ok)
	}
	for _, k := range []fileKey{{0, "bin/b"}, {1, "bin/a"}, {-1, "bin/a"}, {4, "bin/a"}} {
		_, ok := l.ref(k)
		require.False(t, ok)
	}
	_, err = list(t.Context(), files{}, Image{Chain: []string{"sha256:7"}})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.Zero(t, must(list(t.Context(), files{}, Image{Chain: []string{"7"}}))(t).bytes)
}

func must(l *Listing, err error) func(*testing.T) *Listing {
	return func(t *testing.T) *Listing {
		t.Helper()
		require.NoError(t, err)
		return l
	}
}

func TestKnowledgeForPlan(t *testing.T) {
	for k, want := range map[Knowledge]plan.Knowledge{
		Traced: plan.Traced, Inherited: plan.Traced, Pulled: plan.Traced,
		Incomplete: plan.Predicted, Predicted: plan.Predicted, Nothing: plan.Unknown,
	} {
		require.Equal(t, want, k.forPlan(0), "%q", k)
	}
	require.Equal(t, plan.Predicted, Nothing.forPlan(1), "pinned files count")
}

func TestNamed(t *testing.T) {
	require.True(t, tagged("docker.io/library/redis:7"))
	require.False(t, tagged("docker.io/library/redis@sha256:00"))
	require.False(t, tagged(""))
	require.Equal(t, "index.docker.io/library/redis", Repository("redis:7"))
	require.Equal(t, "127.0.0.1:5000/a/b", Repository("127.0.0.1:5000/a/b@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"))
	require.Empty(t, Repository("not a reference"))
}
