// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
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

// A hard link is known by the name under which its data are read.
func TestListing(t *testing.T) {
	image := Image{Chain: []string{"7", "8"}}
	l, err := list(t.Context(), files{all: []File{
		{"/bin/a", "/7/bin/a", 10},
		{"/bin/b", "/7/bin/a", 10},           // a hard link
		{"/new/c", "/7/old/c", 20},           // of a directory that was renamed in a container
		{"/etc/empty", "/8/etc/empty", 0},    // no data
		{"/etc/foreign", "/9/etc/stray", 10}, // of no layer of the image
	}}, image)
	require.NoError(t, err)
	a := profile.Entry{Path: "bin/a", Size: 10}
	c := profile.Entry{Path: "old/c", Size: 20}
	for name, want := range map[string]profile.Entry{"/bin/a": a, "bin/a": a, "/bin/b": a, "/new/c": c} {
		got, ok := l.visible(name)
		require.True(t, ok, name)
		require.Equal(t, want, got, name)
	}
	_, ok := l.Lookup("bin/b")
	require.False(t, ok)
	var all []profile.Entry
	l.All(func(e profile.Entry) bool { all = append(all, e); return true })
	require.Equal(t, []profile.Entry{a, c}, all)
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
	require.True(t, Image{Name: "docker.io/library/redis:7"}.named())
	require.False(t, Image{Name: "docker.io/library/redis@sha256:00"}.named())
	require.False(t, Image{}.named())
	require.Equal(t, "index.docker.io/library/redis", Repository("redis:7"))
	require.Equal(t, "127.0.0.1:5000/a/b", Repository("127.0.0.1:5000/a/b@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"))
	require.Empty(t, Repository("not a reference"))
}
