// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/link"
)

// Registry is a registry of this process with its blobs in a directory and its manifests in memory.
type Registry struct {
	server *http.Server
	addr   string
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/sha256:([0-9a-f]{64})$`)

// NewRegistry serves on a free port of the loopback until Close. Several registries may have the directory at once.
func NewRegistry(dir string) (*Registry, error) {
	if err := os.MkdirAll(filepath.Join(dir, "sha256"), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of registry: %w", err)
	}
	backend := registry.New(
		registry.Logger(log.New(io.Discard, "", 0)),
		registry.WithBlobHandler(blobs{registry.NewDiskBlobHandler(dir), dir}),
		registry.WithReferrersSupport(true),
	)
	server, addr, err := listen(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		m := blobPath.FindStringSubmatch(req.URL.Path)
		if m == nil || req.Method != http.MethodGet {
			backend.ServeHTTP(w, req)
			return
		}
		// The library refuses "Range: bytes=N-", with which containerd resumes.
		w.Header().Set("Docker-Content-Digest", "sha256:"+m[1])
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(w, req, filepath.Join(dir, "sha256", m[1]))
	}))
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	return &Registry{server: server, addr: addr}, nil
}

// Addr is "127.0.0.1:port".
func (r *Registry) Addr() string { return r.addr }

// Close breaks all connections. The blobs stay.
func (r *Registry) Close() error { return r.server.Close() }

// blobs answers Stat from the file's size; the library's own handler reads and hashes the whole blob each time.
type blobs struct {
	registry.BlobHandler
	dir string
}

func (b blobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	st, err := os.Stat(filepath.Join(b.dir, h.Algorithm, h.Hex))
	if errors.Is(err, os.ErrNotExist) {
		return 0, registry.ErrNotFound
	} else if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (b blobs) Put(ctx context.Context, repo string, h v1.Hash, rc io.ReadCloser) error {
	put, ok := b.BlobHandler.(registry.BlobPutHandler)
	if !ok {
		return errors.New("the registry's blob handler cannot store")
	}
	return put.Put(ctx, repo, h, rc)
}

// newLink serves a link in front of the registry.
func newLink(o link.Options) (*link.Link, *http.Server, string, error) {
	l, err := link.New(o)
	if err != nil {
		return nil, nil, "", err
	}
	server, addr, err := listen(l)
	if err != nil {
		return nil, nil, "", fmt.Errorf("start link: %w", err)
	}
	return l, server, addr, nil
}

func listen(h http.Handler) (*http.Server, string, error) {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	server := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	go func() { _ = server.Serve(listener) }() // ends with Close
	return server, listener.Addr().String(), nil
}
