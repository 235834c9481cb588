// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// A file is hot by a profile or a rule of the image that is asked about, or else of another one with the same layer.
func TestHeat(t *testing.T) {
	app, other := imageOf("app", "1"), imageOf("other", "1")
	other.View = "92"
	s := &still{images: []Image{other, app}, files: []File{
		{"/used", "used", "/1/01/1", 10}, {"/unused", "unused", "/1/02/2", 10}, {"/pinned", "pinned", "/1/03/3", 10},
		{"/excluded", "excluded", "/1/04/4", 10}, {"/large", "large", "/1/05/5", 1 << 20},
	}}
	m := newManager(t, s, &shelf{})
	m.config.PartsFrom = 1 << 19
	heat := func(number uint32) Heat {
		t.Helper()
		h, err := m.Heat(t.Context(), app.Digest, app.View, pack.Ref{Layer: 1, Number: number})
		require.NoError(t, err)
		return h
	}
	require.Equal(t, Heat{Why: "it is not known to be used", Moves: true}, heat(1), "nothing is known of the images")

	use := func(path string, size int64) profile.File {
		return profile.File{Path: profile.Path(path), Size: size, Kind: profile.Read, Weight: 0.5, Starts: 2, LastStart: 4, Touched: -1}
	}
	p := profile.New(app.Image, time.Now())
	p.Starts = 4
	p.Files = []profile.File{use("used", 10), use("excluded", 10), use("large", 1<<20)}
	p.Files[2].Touched, p.Files[2].Ranges = 4096, []profile.Range{{Offset: 0, Length: 4096}}
	p.Rules = []profile.Rule{{Glob: "pinned", Action: profile.Pin}, {Glob: "excluded", Action: profile.Exclude}}
	require.NoError(t, m.book.Put(p))
	m.last = Overview{SettledLayers: map[string]bool{"1": true}, Plan: plan.Plan{
		Up:     []plan.Promotion{{Redirect: "/1/03/3"}},
		Down:   []plan.Reduction{{Layer: "1", Keep: map[string]bool{"/1/01/1": true}, Reason: "traced"}},
		Denied: plan.Sum{Files: 1, Bytes: 10},
	}}
	denied := m.last.Plan.Denied
	require.Equal(t, Heat{Hot: true, Why: "50 % of the starts use it", Settled: true, Moves: true, Denied: denied}, heat(1))
	require.Equal(t, Heat{Why: "no start has used it", Settled: true, Moves: true, Leaves: "traced", Denied: denied}, heat(2))
	require.Equal(t, Heat{Hot: true, Why: "it is pinned", Settled: true, Moves: true, Comes: true, Leaves: "traced", Denied: denied}, heat(3))
	require.Equal(t, Heat{Why: "a rule excludes it", Settled: true, Moves: true, Leaves: "traced", Denied: denied}, heat(4))
	require.True(t, heat(5).Parts)
	require.False(t, heat(1).Parts)

	q := profile.New(other.Image, time.Now())
	q.Starts, q.Files = 4, []profile.File{use("unused", 10), use("used", 10)}
	require.NoError(t, m.book.Put(q))
	require.Empty(t, heat(1).Other, "the image itself counts first")
	h := heat(2)
	require.True(t, h.Hot)
	require.Equal(t, "other", h.Other)

	h, err := m.Heat(t.Context(), "", app.View, pack.Ref{Layer: 1, Number: 4})
	require.NoError(t, err)
	require.Equal(t, "a rule excludes it", h.Why, "a snapshot stands for its image")
	h, err = m.Heat(t.Context(), digest.FromString("none"), "77", pack.Ref{Layer: 2, Number: 1})
	require.NoError(t, err)
	require.Empty(t, h.Why, "no image has the layer")
}
