// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// standing makes a socket as a service manager does, and returns what it would pass.
func standing(t *testing.T, path string, mode os.FileMode) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	require.NoError(t, err)
	require.NoError(t, l.Close())
	require.NoError(t, os.Chmod(path, mode))
	return f
}

func TestPassedSockets(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "sock")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	at := func(name string) string { return filepath.Join(dir, name) }

	f := standing(t, at("n"), 0o600)
	s, err := takeSockets([]*os.File{f}, []string{at("n"), at("ctl")})
	require.NoError(t, err)
	l, err := s.listen(at("n"))
	require.NoError(t, err)
	c, err := net.Dial("unix", at("n"))
	require.NoError(t, err)
	accepted, err := l.Accept()
	require.NoError(t, err)
	require.NoError(t, accepted.Close())
	require.NoError(t, c.Close())
	require.NoError(t, l.Close())
	require.FileExists(t, at("n"), "it is the service manager's")
	other, err := s.listen(at("ctl"))
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.NoFileExists(t, at("ctl"), "it was ours")

	_, err = takeSockets([]*os.File{standing(t, at("open"), 0o666)}, []string{at("open")})
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	require.ErrorContains(t, err, "SocketMode=0600")
	_, err = takeSockets([]*os.File{standing(t, at("elsewhere"), 0o600)}, []string{at("n")})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, at("elsewhere"))
	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	defer tcp.Close()
	f, err = tcp.File()
	require.NoError(t, err)
	_, err = takeSockets([]*os.File{f}, []string{tcp.Addr().String()})
	require.ErrorContains(t, err, "the daemon takes unix sockets")
	f, err = os.Open(os.DevNull)
	require.NoError(t, err)
	_, err = takeSockets([]*os.File{f}, nil)
	require.Error(t, err)
	twice := standing(t, at("twice"), 0o600)
	again, err := net.FileListener(twice)
	require.NoError(t, err)
	f, err = again.(*net.UnixListener).File()
	require.NoError(t, err)
	require.NoError(t, again.Close())
	_, err = takeSockets([]*os.File{twice, f}, []string{at("twice")})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
}

// A socket that stands takes whoever comes: where no regions are served he is told so, rather than waiting.
func TestNoRegionsAtStandingSocket(t *testing.T) {
	c := node(t)
	c.SCM.Enabled = false
	s, err := takeSockets([]*os.File{standing(t, c.SCM.Address, 0o600)}, []string{c.SCM.Address})
	require.NoError(t, err)
	r := &regions{stop: func() {}}
	r.begin(t.Context(), c, s, func() int64 { return 0 })
	defer r.stop()
	require.ErrorContains(t, create(c, "orders"), "regions are turned off (scm.enabled)")
	require.Empty(t, r.warnings())
}

// names is a snapshotter that knows the name of one snapshot.
type names struct {
	snapshotsapi.UnimplementedSnapshotsServer
}

func (names) Stat(context.Context, *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	return &snapshotsapi.StatSnapshotResponse{Info: &snapshotsapi.Info{Name: "one"}}, nil
}

func (names) List(_ *snapshotsapi.ListSnapshotsRequest, s snapshotsapi.Snapshots_ListServer) error {
	return s.Send(&snapshotsapi.ListSnapshotsResponse{Info: []*snapshotsapi.Info{{Name: "one"}}})
}

// A call that comes while the store is being opened has a connection at once, and waits for its answer.
func TestEarlyCallsWait(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "early")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	l, err := net.Listen("unix", filepath.Join(dir, "n"))
	require.NoError(t, err)
	e := newEarly()
	served := make(chan error, 1)
	go func() { served <- e.Serve(l) }()
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	client := snapshotsapi.NewSnapshotsClient(conn)

	answers := make(chan string, 2)
	go func() {
		a, err := client.Stat(t.Context(), &snapshotsapi.StatSnapshotRequest{})
		if err != nil {
			answers <- err.Error()
			return
		}
		answers <- a.GetInfo().GetName()
	}()
	go func() {
		stream, err := client.List(t.Context(), &snapshotsapi.ListSnapshotsRequest{})
		if err == nil {
			var a *snapshotsapi.ListSnapshotsResponse
			if a, err = stream.Recv(); err == nil {
				answers <- a.GetInfo()[0].GetName()
				return
			}
		}
		answers <- err.Error()
	}()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		require.True(t, conn.WaitForStateChange(t.Context(), s))
	}
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = client.Stat(brief, &snapshotsapi.StatSnapshotRequest{})
	require.Equal(t, codes.Canceled, status.Code(err), "who no longer wants to wait need not")
	require.Empty(t, answers, "nothing is there yet that could answer")

	e.open(names{}, nil)
	require.Equal(t, "one", <-answers)
	require.Equal(t, "one", <-answers)
	e.GracefulStop()
	require.NoError(t, <-served)

	// A daemon that ends before it has a store ends their waiting too.
	l, err = net.Listen("unix", filepath.Join(dir, "n"))
	require.NoError(t, err)
	e = newEarly()
	go func() { served <- e.Serve(l) }()
	go func() {
		_, err := client.Stat(t.Context(), &snapshotsapi.StatSnapshotRequest{})
		answers <- status.Code(err).String()
	}()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		require.True(t, conn.WaitForStateChange(t.Context(), s))
	}
	e.Stop()
	require.NoError(t, <-served)
	require.Equal(t, codes.Unavailable.String(), <-answers)
}
