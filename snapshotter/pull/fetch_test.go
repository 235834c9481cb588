// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func testProvider(t *testing.T, d *daemon, w *Watcher) {
	const ns = "open"
	s := newSource(t)
	img := s.push("x:1", 4000, 500_000)
	d.pull(ns, s.host+"/x:1")()
	read := func(blob string) ([]byte, error) {
		p, err := w.Provider(t.Context(), ns)
		require.NoError(t, err)
		return content.ReadBlob(t.Context(), p, ocispec.Descriptor{Digest: digest.Digest(blob)})
	}
	got, err := read(img.blobs[1])
	require.NoError(t, err)
	assert.Equal(t, img.blobs[1], digest.FromBytes(got).String())

	d.run(ns, "content", "rm", img.blobs[1])
	_, err = read(img.blobs[1])
	assert.True(t, errdefs.IsNotFound(err), err)
	_, err = w.Provider(t.Context(), "")
	assert.True(t, errdefs.IsInvalidArgument(err), err)
}

// testFetch reads a blob from the registry of an image that has it, while containerd does not.
func testFetch(t *testing.T, d *daemon, w *Watcher) {
	s := newSource(t)
	img := s.push("x:1", 4000, 500_000)
	d.pull("fetch", s.host+"/x:1")()
	d.run("fetch", "content", "rm", img.blobs[1])
	w.hosts = docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))
	blob := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.Digest(img.blobs[1]), Size: img.sizes[1]}
	r, image, err := w.Fetch(t.Context(), []string{"fetch-elsewhere", "fetch"}, blob)
	require.NoError(t, err)
	assert.Equal(t, s.host+"/x:1", image)
	got, err := io.ReadAll(r)
	require.NoError(t, errors.Join(err, r.Close()))
	assert.Equal(t, blob.Digest, digest.FromBytes(got))

	// Who cancels waits for nothing.
	release := s.link.Hold(img.blobs[1], 1000)
	ctx, cancel := context.WithCancel(t.Context())
	r, _, err = w.Fetch(ctx, []string{"fetch"}, blob)
	require.NoError(t, err)
	cancel()
	_, err = io.Copy(io.Discard, r)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, r.Close())
	release()

	s.link.SetDown(true)
	_, image, err = w.Fetch(t.Context(), []string{"fetch"}, blob)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, s.host+"/x:1")
	assert.Equal(t, s.host+"/x:1", image)
	blob.Digest = digest.FromString("of no image")
	_, image, err = w.Fetch(t.Context(), []string{"fetch"}, blob)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.Empty(t, image)
}

// TestHanging: something listens, and never answers.
func TestHanging(t *testing.T) {
	address := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", address)
	require.NoError(t, err)
	defer l.Close()
	w := New(address, WithTimeout(50*time.Millisecond))
	defer w.Close()
	_, _, err = w.Find(t.Context(), "n", digest.FromString("x").String(), nil)
	assert.True(t, errdefs.IsUnavailable(err), err)
	assert.ErrorContains(t, err, "did not answer within 50ms")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = w.Find(ctx, "n", digest.FromString("x").String(), nil)
	assert.True(t, errors.Is(err, context.Canceled) && !errdefs.IsUnavailable(err), "who gave up knows why: %v", err)
}
