// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/profile"
)

func layers(names string) (all []digest.Digest) {
	for _, n := range strings.Fields(names) {
		all = append(all, digest.FromString(n))
	}
	return all
}

// profileOf has a file in each of its layers, of the name of the layer.
func profileOf(image, repository, names string) profile.Profile {
	p := profile.New(profile.Image{Digest: digest.FromString(image), Repository: repository, Layers: layers(names)}, time.Now())
	p.Starts = 4
	for i, n := range strings.Fields(names) {
		p.Files = append(p.Files, profile.File{Path: profile.Path("bin/" + n), Layer: i, Size: 10, Kind: profile.Read, Weight: 0.5, Starts: 2, LastStart: 4, Touched: -1})
	}
	return p
}

func TestHotFilesOfAPull(t *testing.T) {
	m := newManager(t, &still{}, &shelf{})
	m.config.Fetch = true
	const repo = "example.com/redis"
	arriving := func(image, names string) Arriving {
		return Arriving{Image: profile.Image{Digest: digest.FromString(image), Repository: repo, Layers: layers(names)}}
	}
	expect := func(h HotSet, layer int, path string, want bool, why string) {
		t.Helper()
		hot, got := h.File(layer, path)
		require.Equal(t, want, hot, got)
		require.Contains(t, got, why)
	}
	h := m.Hot(t.Context(), arriving("new", "a"))
	require.Equal(t, Nothing, h.How)
	expect(h, 0, "bin/a", false, "not known")

	require.NoError(t, m.book.Put(profileOf("old", repo, "a b c")))
	h = m.Hot(t.Context(), arriving("old", "a b c"))
	require.Equal(t, Traced, h.How)
	expect(h, 0, "bin/a", true, "50 % of the starts use it")
	expect(h, 1, "bin/a", false, "no start")
	expect(h, 0, "bin/x", false, "no start")
	expect(h, 3, "bin/a", false, "no such layer")
	expect(h, -1, "bin/a", false, "no such layer")

	// b is changed, c has moved, d is new; a layer may be there twice.
	h = m.Hot(t.Context(), arriving("new", "d a B c d"))
	require.Equal(t, Inherited, h.How)
	require.True(t, h.Settled())
	expect(h, 1, "bin/a", true, "50 % of the starts of an earlier version used it")
	expect(h, 0, "bin/a", false, "no start") // hidden by a
	expect(h, 2, "bin/a", true, "earlier")   // hides a
	expect(h, 3, "bin/a", false, "no start") // c had it hidden then, too
	for _, layer := range []int{0, 2, 4} {
		expect(h, layer, "bin/b", true, "earlier")
	}
	expect(h, 1, "bin/b", false, "no start")
	expect(h, 3, "bin/c", true, "earlier")

	_, err := m.book.SetRule(profile.Image{Digest: digest.FromString("old"), Layers: layers("a b c")}, profile.Rule{Glob: "bin/[ax]", Action: profile.Pin}, nil, time.Now())
	require.NoError(t, err)
	h = m.Hot(t.Context(), arriving("new", "d a B c d"))
	expect(h, 0, "bin/x", true, "pinned")
	_, err = m.book.SetRule(profile.Image{Digest: digest.FromString("new"), Layers: layers("d a B c d")}, profile.Rule{Glob: "bin/b", Action: profile.Exclude}, &Listing{}, time.Now())
	require.NoError(t, err)
	h = m.Hot(t.Context(), arriving("new", "d a B c d"))
	expect(h, 2, "bin/b", false, "excludes")

	require.NoError(t, m.predictions.Put(profileOf("guess", "", "a")))
	h = m.Hot(t.Context(), arriving("guess", "a"))
	require.Equal(t, Predicted, h.How)
	require.False(t, h.Settled())
	expect(h, 0, "bin/a", true, "analysis")
	expect(h, 0, "bin/b", false, "not known")
}

// The registry is asked once, when the pull begins, and what it says is there
// for the pull and for the image once it is whole.
func TestRegistryIsAskedWhenAPullBegins(t *testing.T) {
	var requests atomic.Int64
	hold := make(chan struct{})
	h := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	var slow atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if slow.Load() && strings.Contains(r.URL.Path, "/referrers/") {
			requests.Add(1)
			<-hold
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	img, err := random.Image(100, 2)
	require.NoError(t, err)
	ref := strings.TrimPrefix(srv.URL, "http://") + "/library/redis:7"
	tag, err := name.ParseReference(ref)
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img))
	d, err := img.Digest()
	require.NoError(t, err)
	p := profileOf("", "", "a b")
	p.Image = digest.Digest(d.String())
	_, err = profile.Registry{PlainHTTP: true}.Push(t.Context(), ref, p)
	require.NoError(t, err)
	slow.Store(true)

	image := Image{Image: profile.Image{Digest: p.Image, Layers: p.Layers}, Namespace: "default", Name: ref, View: "9", Chain: []string{"1", "2"}}
	s := &still{images: []Image{image}, files: []File{{"/bin/a", "bin/a", "/1/01/1", 10}}}
	m := newManager(t, s, &shelf{})
	m.config.Fetch, m.config.PlainHTTP = true, []string{tag.Context().RegistryStr()}
	early, cancel := context.WithCancel(t.Context())
	cancel()
	pulled := Arriving{Image: image.Image, Name: ref}
	set := m.Hot(early, pulled)
	require.Equal(t, Nothing, set.How, "who cannot wait is told what is known")
	close(hold)
	set = m.Hot(t.Context(), pulled)
	require.Equal(t, Pulled, set.How)
	hot, why := set.File(1, "bin/b")
	require.True(t, hot)
	require.Contains(t, why, "registry")
	hot, _ = set.File(0, "bin/b")
	require.False(t, hot)
	other := pulled
	other.Layers = layers("a c")
	set = m.Hot(t.Context(), other)
	require.Equal(t, Nothing, set.How, "it does not fit")

	require.True(t, m.learn(t.Context(), s.images))
	got, how, err := m.known(image.Digest)
	require.NoError(t, err)
	require.Equal(t, Pulled, how)
	require.Len(t, got.Files, 1, "what the image does not have is left out")
	require.EqualValues(t, 1, requests.Load())
	require.Empty(t, m.early.asked)
}
