// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// early is the server of containerd's calls before there is a snapshotter. It takes connections as soon as the process runs, and holds calls until it is opened:
// containerd gives a connection that nobody answers one second (grpc.ConnectParams without a MinConnectTimeout in cmd/containerd/server), and then refuses calls
// for up to three, while a call has whatever time its client gives it. Opening the store may take longer than that second.
type early struct {
	*grpc.Server
	ready     chan struct{} // closed by open, after which the services do not change
	snapshots *lateSnapshots
	diff      *lateDiff
}

type (
	lateSnapshots struct{ snapshotsapi.SnapshotsServer }
	lateDiff      struct{ diffapi.DiffServer }
)

func newEarly() *early {
	e := &early{ready: make(chan struct{}), snapshots: &lateSnapshots{}, diff: &lateDiff{}}
	e.Server = grpc.NewServer(
		grpc.ChainUnaryInterceptor(oneLineUnary, func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, call grpc.UnaryHandler) (any, error) {
			if err := e.wait(ctx); err != nil {
				return nil, err
			}
			return call(ctx, req)
		}),
		grpc.ChainStreamInterceptor(oneLineStream, func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, call grpc.StreamHandler) error {
			if err := e.wait(stream.Context()); err != nil {
				return err
			}
			return call(srv, stream)
		}),
	)
	snapshotsapi.RegisterSnapshotsServer(e.Server, e.snapshots)
	diffapi.RegisterDiffServer(e.Server, e.diff)
	return e
}

// open lets calls through. It is called once.
func (e *early) open(snapshots snapshotsapi.SnapshotsServer, diff diffapi.DiffServer) {
	e.snapshots.SnapshotsServer, e.diff.DiffServer = snapshots, diff
	close(e.ready)
}

func (e *early) wait(ctx context.Context) error {
	select {
	case <-e.ready:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}
