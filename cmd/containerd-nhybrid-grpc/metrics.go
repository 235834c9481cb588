// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nhybrid/nhybrid/snapshotter"
)

// serveMetrics serves Prometheus metrics on "host:port" or the path of a unix
// socket; on nothing if address is "".
func serveMetrics(address string, passed sockets, sn *snapshotter.Snapshotter, failed chan<- error) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	var l net.Listener
	if strings.HasPrefix(address, "/") {
		l, err = passed.listen(address)
	} else {
		l, err = net.Listen("tcp", address)
	}
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(sn.Metrics(), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorLog: log.L, ErrorHandling: promhttp.ContinueOnError}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("serve metrics on %q: %w", address, err)
		}
	}()
	return func() { srv.Close() }, nil
}
