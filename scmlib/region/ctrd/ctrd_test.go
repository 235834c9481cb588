// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// oneContainer answers for one container.
type oneContainer struct {
	containersapi.UnimplementedContainersServer
	created time.Time
}

func (c oneContainer) Get(_ context.Context, r *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	if r.GetID() != "web" {
		return nil, status.Errorf(codes.NotFound, "container %q", r.GetID())
	}
	return &containersapi.GetContainerResponse{Container: &containersapi.Container{ID: "web", CreatedAt: timestamppb.New(c.created)}}, nil
}

// The daemon starts before containerd and is refused; the first container must start all the same.
func TestIdentifyRightAfterContainerdCame(t *testing.T) {
	address := filepath.Join(t.TempDir(), "c.sock")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: address})
	require.NoError(t, err)
	old.SetUnlinkOnClose(false) // of a containerd that ran before
	require.NoError(t, old.Close())
	c, err := client.New(address, client.WithTimeout(time.Minute))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	conn := c.Conn().(*grpc.ClientConn)
	conn.Connect()
	require.Eventually(t, func() bool { return conn.GetState() == connectivity.TransientFailure }, 10*time.Second, time.Millisecond)

	created := time.Unix(1, 234).UTC()
	server := grpc.NewServer()
	containersapi.RegisterContainersServer(server, oneContainer{created: created})
	require.NoError(t, os.Remove(address))
	l, err := net.Listen("unix", address)
	require.NoError(t, err)
	t.Cleanup(server.Stop)
	go func() { _ = server.Serve(l) }()

	identify := Identify(func() (*client.Client, error) { return c, nil })
	got, err := identify(t.Context(), "default", "web")
	require.NoError(t, err)
	require.Equal(t, created.Format(time.RFC3339Nano), got)
	_, err = identify(t.Context(), "default", "db")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}
