// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/placement"
)

// failing answers everything with err, and a watch with nothing until it is cancelled.
type failing struct {
	hotFake
	err     error
	watched chan struct{}
}

func (f failing) Status(context.Context) (*StatusResponse, error) {
	return &StatusResponse{Policy: "lass"}, f.err
}
func (f failing) List(_ context.Context, _ *ListRequest, send func(*Snapshot) error) error {
	return errors.Join(send(&Snapshot{Id: "1"}), f.err)
}
func (f failing) Inspect(context.Context, *InspectRequest) (*InspectResponse, error) {
	return &InspectResponse{}, f.err
}
func (f failing) Why(context.Context, *WhyRequest) (*WhyResponse, error) {
	return &WhyResponse{}, f.err
}
func (f failing) Usage(context.Context, *UsageRequest) (*UsageResponse, error) { return nil, f.err }
func (f failing) Watch(ctx context.Context, _ *WatchRequest, _ func(*Event) error) error {
	close(f.watched)
	<-ctx.Done()
	return ctx.Err()
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "control") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func start(t *testing.T, b Backend) (*Server, string) {
	t.Helper()
	dir := shortDir(t)
	socket := filepath.Join(dir, "new", "control.sock")
	l, err := Listen(socket)
	require.NoError(t, err)
	s := NewServer(b, Info{Version: "v1", Revision: "r", Address: "/a", Config: []byte("version = 1\n")})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop(t.Context())
		require.NoError(t, <-done)
	})
	return s, socket
}

func TestStatusAndConfig(t *testing.T) {
	_, socket := start(t, failing{})
	c, done, err := Dial(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, done()) })
	s, err := c.Status(t.Context(), &StatusRequest{})
	require.NoError(t, err)
	require.Equal(t, "lass", s.GetPolicy())
	require.Equal(t, "v1", s.GetVersion())
	require.Equal(t, "/a", s.GetAddress())
	require.Equal(t, int64(os.Getpid()), s.GetPid())
	require.WithinRange(t, s.GetStarted().AsTime(), time.Now().Add(-time.Minute), time.Now())
	config, err := c.Config(t.Context(), &ConfigRequest{})
	require.NoError(t, err)
	require.Equal(t, "version = 1\n", config.GetToml())
}

func TestErrorsKeepTheirClass(t *testing.T) {
	for _, class := range []error{errdefs.ErrNotFound, errdefs.ErrInvalidArgument, errdefs.ErrUnavailable, errdefs.ErrFailedPrecondition} {
		_, socket := start(t, failing{err: fmt.Errorf("the reason: %w", class)})
		c, done, err := Dial(socket)
		require.NoError(t, err)
		_, err = c.Status(t.Context(), &StatusRequest{})
		check := func(err error) {
			t.Helper()
			require.ErrorIs(t, errgrpc.ToNative(err), class)
			require.ErrorContains(t, err, "the reason")
		}
		check(err)
		_, err = c.Inspect(t.Context(), &InspectRequest{Ref: "x"})
		check(err)
		_, err = c.Why(t.Context(), &WhyRequest{Image: "x", Path: []byte("/x\xff")})
		check(err)
		_, err = c.Usage(t.Context(), &UsageRequest{})
		check(err)
		list, err := c.List(t.Context(), &ListRequest{})
		require.NoError(t, err)
		s, err := list.Recv()
		require.NoError(t, err)
		require.Equal(t, "1", s.GetId())
		_, err = list.Recv()
		check(err)
		require.NoError(t, done())
	}
}

func TestBadRequests(t *testing.T) {
	_, socket := start(t, failing{})
	c, done, err := Dial(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, done()) })
	_, err = c.Inspect(t.Context(), &InspectRequest{})
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrInvalidArgument)
	_, err = c.Why(t.Context(), &WhyRequest{})
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrInvalidArgument)
	_, err = c.Why(t.Context(), &WhyRequest{Image: "x", Path: []byte("etc/passwd")})
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrInvalidArgument)
}

func TestHealthAndReflection(t *testing.T) {
	s, socket := start(t, failing{})
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	for _, service := range []string{"", "nhybrid.control.v1.Control", "nhybrid.control.v1.Hot"} {
		for ready, want := range map[bool]healthpb.HealthCheckResponse_ServingStatus{
			false: healthpb.HealthCheckResponse_NOT_SERVING, true: healthpb.HealthCheckResponse_SERVING,
		} {
			s.SetServing(ready)
			r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
			require.NoError(t, err)
			require.Equal(t, want, r.GetStatus())
		}
	}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	r, err := stream.Recv()
	require.NoError(t, err)
	var names []string
	for _, s := range r.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	require.Contains(t, names, "nhybrid.control.v1.Control")
	require.Contains(t, names, "nhybrid.control.v1.Hot")
	require.NoError(t, stream.CloseSend())
}

// A watch has no end of its own; the server must not wait for one.
func TestStopEndsWatches(t *testing.T) {
	b := failing{watched: make(chan struct{})}
	s, socket := start(t, b)
	c, done, err := Dial(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, done()) })
	stream, err := c.Watch(t.Context(), &WatchRequest{})
	require.NoError(t, err)
	<-b.watched
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s.Stop(ctx)
	require.NoError(t, ctx.Err(), "the server had to be stopped by force")
	_, err = stream.Recv()
	require.Error(t, err)
}

func TestListen(t *testing.T) {
	dir := shortDir(t)
	socket := filepath.Join(dir, "s")
	l, err := Listen(socket)
	require.NoError(t, err)
	info, err := os.Lstat(socket)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o600, info.Mode())

	_, err = Listen(socket)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.ErrorContains(t, err, "in use")

	unix, ok := l.(*net.UnixListener)
	require.True(t, ok)
	unix.SetUnlinkOnClose(false) // as if the process had been killed
	require.NoError(t, l.Close())
	l, err = Listen(socket)
	require.NoError(t, err)
	require.NoError(t, l.Close())

	precious := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(precious, []byte("precious"), 0o600))
	_, err = Listen(precious)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	content, err := os.ReadFile(precious)
	require.NoError(t, err)
	require.Equal(t, "precious", string(content))

	_, err = Listen(filepath.Join(precious, "s"))
	require.Error(t, err)
}

func TestJSON(t *testing.T) {
	s := &Snapshot{Id: "1", NvmBytes: proto.Int64(1 << 60), Labels: map[string]string{"b": "<2>", "a": "1"}, Images: []string{"x"}, Created: timestamppb.New(time.Unix(1, 5).UTC())}
	b, err := JSON(s)
	require.NoError(t, err)
	var v map[string]any
	require.NoError(t, json.Unmarshal(b, &v))
	require.Equal(t, "1970-01-01T00:00:01.000000005Z", v["created"])
	require.Equal(t, false, v["durable"])
	require.Contains(t, string(b), `"nvm_bytes":1152921504606846976,`)
	require.Contains(t, string(b), `"hdd_bytes":null,`, "it is not known")
	require.Contains(t, string(b), `"labels":{"a":"1","b":"<2>"}`)
	b, err = JSON(&Layer{})
	require.NoError(t, err)
	require.Contains(t, string(b), `"decision":null`)
	// A tar may hold names that are not UTF-8, which protobuf strings and JSON do not.
	b, err = JSON(&File{Path: []byte("/n/bad\xff"), Target: []byte("caf\xc3\xa9")})
	require.NoError(t, err)
	require.Contains(t, string(b), `"path":{"base64":"L24vYmFk/w=="}`)
	require.Contains(t, string(b), `"target":"café"`)
}

func TestNewDecision(t *testing.T) {
	policy, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	d := NewDecision(policy.Decide(placement.Input{
		Index: 1, NVMFree: 1e9, NVMReserve: 5e7, HDDRate: 47e6,
		Layers: []placement.Layer{
			{Compressed: 10, Downloaded: true, Stored: true},
			{Compressed: 100, Uncompressed: 300, Exact: true, Downloaded: true},
			{Compressed: 1000, Offset: 400},
		},
	}))
	require.Equal(t, "hdd", d.GetTier())
	require.Equal(t, int32(1), d.GetIndex())
	require.Equal(t, int32(3), d.GetLayers())
	require.Equal(t, int32(1), d.GetDownloading())
	require.Equal(t, int64(600), d.GetBytesLeft())
	require.Equal(t, int64(300), d.GetSize())
	require.True(t, d.GetSizeExact())
	require.NotContains(t, d.Cause(), "layer 1 to HDD: ")
	require.NotEmpty(t, d.Cause())
}

func TestSentencesOfNothing(t *testing.T) {
	var none *Layer
	require.NotPanics(t, func() { _ = none.Sentence(0); _ = (&File{}).Sentence(none, 0) })
}
