// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/registry"
)

const imageName = "pmem:1"

// registryServer serves one image from memory on the loopback of this machine, which guests reach through QEMU's user network.
type registryServer struct {
	*http.Server
	host      string // as this machine names it
	guestHost string // as a guest names it
	blobs     atomic.Int64
}

func serveRegistry(image [][]entry) (*registryServer, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start registry: %w", err), listener.Close())
	}
	r := &registryServer{host: "127.0.0.1:" + port, guestHost: "10.0.2.2:" + port}
	r.Server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") {
			r.blobs.Add(1)
		}
		handler.ServeHTTP(w, q)
	})}
	go func() { _ = r.Serve(listener) }()
	if err := pushImage(r.host+"/"+imageName, image); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}
