// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region"
)

const mib = 1 << 20

func open(t *testing.T) (*region.Store, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "region-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	s, err := region.Open(context.Background(), dir, region.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s, dir
}

// tamper serves a registry and changes the bodies of blobs on their way, if asked to.
func tamper(t *testing.T, change func([]byte) []byte) (addr string) {
	t.Helper()
	backend := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if change == nil || req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/sha256:") {
			backend.ServeHTTP(w, req)
			return
		}
		rec := httptest.NewRecorder()
		backend.ServeHTTP(rec, req)
		w.WriteHeader(rec.Code)
		_, _ = w.Write(change(rec.Body.Bytes()))
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func TestPushPull(t *testing.T) {
	ctx := t.Context()
	s, dir := open(t)
	r, err := s.Create(ctx, "default", "orders", region.CreateOptions{Size: 4 * mib})
	require.NoError(t, err)
	path := filepath.Join(dir, "k", "volume+default+orders", "data")
	reg, err := scmlib.Open(path, scmlib.Options{Create: true, Layout: "orders v1"})
	require.NoError(t, err)
	uuid := reg.Info().UUID
	require.NoError(t, reg.Close())

	ref := tamper(t, nil) + "/regions/orders:1"
	remoteTo := Remote{PlainHTTP: true}
	pushed, err := remoteTo.Push(ctx, s, r.Ref, ref)
	require.NoError(t, err)
	require.Less(t, pushed.Sent, int64(64<<10))

	other, otherDir := open(t)
	for i, from := range []string{ref, pushed.Ref} {
		volume := []string{"one", "two"}[i]
		got, err := remoteTo.Pull(ctx, other, from, "elsewhere", volume)
		require.NoError(t, err)
		require.Equal(t, r.Size, got.Size)
		back, err := scmlib.Open(filepath.Join(otherDir, "k", "volume+elsewhere+"+volume, "data"), scmlib.Options{Layout: "orders v1"})
		require.NoError(t, err)
		require.Equal(t, uuid, back.Info().Parent)
		require.NoError(t, back.Close())
	}
	_, err = remoteTo.Pull(ctx, other, ref+"x", "elsewhere", "three")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	_, err = remoteTo.Pull(ctx, other, "not a reference", "elsewhere", "three")
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)

	img, err := random.Image(100, 1)
	require.NoError(t, err)
	n, err := name.ParseReference(ref+"-image", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(n, img))
	_, err = remoteTo.Pull(ctx, other, ref+"-image", "elsewhere", "three")
	require.ErrorContains(t, err, "it is no region")
	require.Len(t, other.List(""), 2)
}

// What comes is not what was sent: nothing is made of it.
func TestPullOfDamaged(t *testing.T) {
	ctx := t.Context()
	s, _ := open(t)
	r, err := s.Create(ctx, "default", "a", region.CreateOptions{Size: mib})
	require.NoError(t, err)
	for name, change := range map[string]func([]byte) []byte{
		"changed": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"cut":     func(b []byte) []byte { return b[:len(b)-5] },
		"longer":  func(b []byte) []byte { return append(b, 0) },
		"empty":   func([]byte) []byte { return nil },
	} {
		ref := tamper(t, change) + "/a:1"
		_, err := Remote{PlainHTTP: true}.Push(ctx, s, r.Ref, ref)
		require.NoError(t, err)
		_, err = Remote{PlainHTTP: true}.Pull(ctx, s, ref, "default", "b")
		require.Error(t, err, name)
		require.Len(t, s.List(""), 1)
	}
}
