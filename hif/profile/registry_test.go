// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

type place struct {
	Registry
	ref    string
	repo   name.Repository
	digest digest.Digest
}

// upstream is a registry with an image in it.
func upstream(t *testing.T, wrap func(http.Handler) http.Handler, opts ...registry.Option) place {
	t.Helper()
	h := registry.New(append(opts, registry.Logger(log.New(io.Discard, "", 0)))...)
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	img, err := random.Image(100, 2)
	require.NoError(t, err)
	ref := strings.TrimPrefix(srv.URL, "http://") + "/library/redis:7"
	tag, err := name.ParseReference(ref)
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img))
	d, err := img.Digest()
	require.NoError(t, err)
	return place{Registry{PlainHTTP: true}, ref, tag.Context(), digest.Digest(d.String())}
}

func (pl place) profile() Profile {
	p := example()
	p.Image = pl.digest
	return p
}

func TestRegistry(t *testing.T) {
	ctx := t.Context()
	for api, opts := range map[string][]registry.Option{
		"referrers": {registry.WithReferrersSupport(true)},
		"fallback":  nil,
	} {
		t.Run(api, func(t *testing.T) {
			pl := upstream(t, nil, opts...)
			_, _, err := pl.Pull(ctx, pl.ref, pl.digest)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			p := pl.profile()
			_, err = pl.Push(ctx, pl.ref, p)
			require.NoError(t, err)
			got, _, err := pl.Pull(ctx, pl.ref, pl.digest)
			require.NoError(t, err)
			require.Empty(t, got.Rules, "the operator's rules stay at home")
			p.Rules = nil
			require.Equal(t, p, got)
			// The newest counts, whatever was pushed last.
			newer, older := p, p
			newer.Updated, newer.Repository = day.Add(48*time.Hour), "newer"
			older.Updated, older.Repository = day, "older"
			for _, q := range []Profile{newer, older} {
				_, err = pl.Push(ctx, pl.ref, q)
				require.NoError(t, err)
			}
			got, _, err = pl.Pull(ctx, pl.ref, pl.digest)
			require.NoError(t, err)
			require.Equal(t, "newer", got.Repository)
			// Other artifacts of the image are none of ours.
			_, _, err = pl.Pull(ctx, pl.ref, dig("other"))
			require.ErrorIs(t, err, errdefs.ErrNotFound)
		})
	}
}

func TestPushRefuses(t *testing.T) {
	pl := upstream(t, nil)
	p := example() // of an image that is not there
	_, err := pl.Push(t.Context(), pl.ref, p)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	p.Files[0].Path = "../x"
	_, err = pl.Push(t.Context(), pl.ref, p)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = pl.Push(t.Context(), "not a reference!", pl.profile())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, _, err = pl.Pull(t.Context(), pl.ref, "sha256:../..")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
	require.ErrorIs(t, err, context.Canceled)
}

func TestCredentials(t *testing.T) {
	guard := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if u, p, _ := r.BasicAuth(); r.Header.Get("X-Setup") == "" && (u != "me" || p != "secret") {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	open := httptest.NewServer(inner)
	t.Cleanup(open.Close)
	closed := httptest.NewServer(guard(inner))
	t.Cleanup(closed.Close)
	img, err := random.Image(10, 1)
	require.NoError(t, err)
	tag, err := name.ParseReference(strings.TrimPrefix(open.URL, "http://") + "/a/b:1")
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img))
	d, err := img.Digest()
	require.NoError(t, err)
	p := example()
	p.Image = digest.Digest(d.String())
	ref := strings.TrimPrefix(closed.URL, "http://") + "/a/b:1"
	_, err = Registry{PlainHTTP: true, Keychain: keychain{authn.Anonymous}}.Push(t.Context(), ref, p)
	require.ErrorIs(t, err, errdefs.ErrUnauthenticated)
	reg := Registry{PlainHTTP: true, Keychain: keychain{&authn.Basic{Username: "me", Password: "secret"}}}
	_, err = reg.Push(t.Context(), ref, p)
	require.NoError(t, err)
	_, _, err = reg.Pull(t.Context(), ref, p.Image)
	require.NoError(t, err)
}

type keychain struct{ authn.Authenticator }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) { return k.Authenticator, nil }

// Artifacts as an attacker would push them.
func TestHostileArtifacts(t *testing.T) {
	ctx := t.Context()
	for name, tc := range map[string]struct {
		body   func(place) string
		mangle func(place, *v1.Manifest)
		want   string
	}{
		"another image's profile": {body: func(place) string { return encoded(t, example()) }, want: "profile of image"},
		"paths that lead out":     {body: func(pl place) string { return strings.Replace(encoded(t, pl.profile()), "usr/bin", "usr/../../bin", 1) }, want: "leads out"},
		"schema of the future":    {body: func(place) string { return `{"schema":3}` }, want: "schema 3 is newer"},
		"no profile":              {body: func(place) string { return "MZ" }, want: "invalid character"},
		"too large":               {mangle: func(_ place, m *v1.Manifest) { m.Layers[0].Size = 1 << 40 }, want: "bytes, more than"},
		"less than it says":       {mangle: func(_ place, m *v1.Manifest) { m.Layers[0].Size++ }, want: "has not the"},
		"more than it says":       {mangle: func(_ place, m *v1.Manifest) { m.Layers[0].Size-- }, want: "has not the"},
		"negative size":           {mangle: func(_ place, m *v1.Manifest) { m.Layers[0].Size = -1 }, want: "bytes, more than"},
		"two layers":              {mangle: func(_ place, m *v1.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }, want: "not one layer"},
		"no layer":                {mangle: func(_ place, m *v1.Manifest) { m.Layers = nil }, want: "not one layer"},
		"a missing blob":          {mangle: func(_ place, m *v1.Manifest) { m.Layers[0].Digest.Hex = strings.Repeat("0", 64) }, want: "Unknown blob"},
	} {
		t.Run(name, func(t *testing.T) {
			pl := upstream(t, nil)
			body := encoded(t, pl.profile())
			if tc.body != nil {
				body = tc.body(pl)
			}
			attach(t, pl, body, "2030-01-01T00:00:00Z", func(m *v1.Manifest) {
				if tc.mangle != nil {
					tc.mangle(pl, m)
				}
			})
			_, _, err := pl.Pull(ctx, pl.ref, pl.digest)
			require.ErrorContains(t, err, tc.want)
			require.False(t, tc.want == "" || errdefs.IsNotFound(err) && name != "a missing blob")
			// A good one beside it is found all the same.
			_, err = pl.Push(ctx, pl.ref, pl.profile())
			require.NoError(t, err)
			_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
			require.NoError(t, err)
		})
	}
}

// A registry that lies: other content under a digest, a list that names what is
// no referrer, answers without end.
func TestHostileRegistry(t *testing.T) {
	ctx := t.Context()
	var swap func(http.ResponseWriter, *http.Request) bool
	pl := upstream(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if swap == nil || !swap(w, r) {
				h.ServeHTTP(w, r)
			}
		})
	}, registry.WithReferrersSupport(true))
	p := pl.profile()
	artifact, err := pl.Push(ctx, pl.ref, p)
	require.NoError(t, err)

	body := encoded(t, func() Profile { q := p; q.Rules = nil; return q }())
	swap = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		_, _ = io.WriteString(w, strings.Replace(body, `"size":100`, `"size":101`, 1))
		return true
	}
	_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
	require.ErrorContains(t, err, "verifying sha256")

	swap = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/manifests/"+artifact.String()) {
			return false
		}
		_, _ = io.WriteString(w, "{}")
		return true
	}
	_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
	require.ErrorContains(t, err, "does not match")

	endless := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		for {
			if _, err := io.WriteString(w, strings.Repeat(" ", 1<<16)); err != nil {
				return
			}
		}
	}
	for _, part := range []string{"/referrers/", "/manifests/" + artifact.String(), "/blobs/"} {
		swap = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, part) {
				return false
			}
			endless(w)
			return true
		}
		_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
		require.Error(t, err, part)
	}

	swap = nil

	// A list that names the profile of another image as this one's.
	other := upstream(t, nil)
	theirs := other.profile()
	attached := attach(t, pl, encoded(t, theirs), "2030-01-01T00:00:00Z", func(m *v1.Manifest) { m.Subject.Digest.Hex = other.digest.Encoded() })
	swap = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/referrers/") {
			return false
		}
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		_ = json.NewEncoder(w).Encode(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{attached}})
		return true
	}
	_, _, err = pl.Pull(ctx, pl.ref, pl.digest)
	require.ErrorContains(t, err, "subject is another image")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// attach pushes an artifact with any content.
func attach(t *testing.T, pl place, body, created string, mangle func(*v1.Manifest)) v1.Descriptor {
	t.Helper()
	subject, err := v1.NewHash(pl.digest.String())
	require.NoError(t, err)
	config, layer := static.NewLayer([]byte("{}"), MediaType), static.NewLayer([]byte(body), MediaType)
	require.NoError(t, remote.WriteLayer(pl.repo, config))
	require.NoError(t, remote.WriteLayer(pl.repo, layer))
	cd, err := describe(config)
	require.NoError(t, err)
	ld, err := describe(layer)
	require.NoError(t, err)
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: MediaType, Config: cd, Layers: []v1.Descriptor{ld},
		Subject:     &v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: subject, Size: 1},
		Annotations: map[string]string{"org.opencontainers.image.created": created}}
	mangle(&m)
	raw, err := json.Marshal(m)
	require.NoError(t, err)
	h, _, err := v1.SHA256(strings.NewReader(string(raw)))
	require.NoError(t, err)
	require.NoError(t, remote.Put(pl.repo.Digest(h.String()), manifest(raw)))
	return v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: int64(len(raw)), ArtifactType: MediaType, Annotations: m.Annotations}
}
