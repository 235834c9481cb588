// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Info is what the server answers by itself.
type Info struct {
	Version, Revision string
	Address           string // socket of the snapshotter
	Config            []byte // the configuration in use, as TOML
}

// Server is the gRPC server of the control socket, with health service and reflection. It serves from the first call
// of Serve and is reported healthy after SetServing(true).
type Server struct {
	grpc    *grpc.Server
	health  *health.Server
	service *service
}

// NewServer makes a server for backend.
func NewServer(backend Backend, info Info) *Server {
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{
		grpc:    grpc.NewServer(),
		health:  health.NewServer(),
		service: &service{backend: backend, info: info, started: time.Now(), ctx: ctx, stop: stop},
	}
	RegisterControlServer(s.grpc, s.service)
	RegisterHotServer(s.grpc, &hotService{backend: backend, ctx: ctx})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.SetServing(false)
	return s
}

// SetServing tells the health service if the daemon is ready.
func (s *Server) SetServing(ready bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if ready {
		state = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", state)
	s.health.SetServingStatus(Control_ServiceDesc.ServiceName, state)
	s.health.SetServingStatus(Hot_ServiceDesc.ServiceName, state)
}

// Serve answers on l until Stop.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// Stop ends the watches, waits for the other calls for as long as ctx lasts, and closes the listener.
func (s *Server) Stop(ctx context.Context) {
	s.health.Shutdown()
	s.service.stop()
	done := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
}

// Listen makes a unix socket of mode 0600 at path, and its directory where missing. The socket of a dead process is
// replaced; one that answers gives errdefs.ErrAlreadyExists, and something that is no socket is never touched.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("create directory of socket %q: %w", path, err)
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("look at socket %q: %w", path, err)
	case info.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("socket %q: there is something that is no socket; move it away or choose another address: %w", path, errdefs.ErrFailedPrecondition)
	default:
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
			return nil, fmt.Errorf("socket %q is in use by another process; stop that one or choose another address: %w", path, errdefs.ErrAlreadyExists)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("ask who serves socket %q: %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove dead socket %q: %w", path, err)
		}
	}
	// bind(2) gives the file the mode of the socket's inode, so that at no time anyone else can connect.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	return l, nil
}

// Client asks both services of a socket.
type Client struct {
	ControlClient
	HotClient
}

// Dial makes a client for the socket at path. It connects at the first call, whose errors are errdefs' through errgrpc.
func Dial(path string) (Client, func() error, error) {
	c, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return Client{}, nil, fmt.Errorf("dial %q: %w", path, err)
	}
	return Client{NewControlClient(c), NewHotClient(c)}, c.Close, nil
}

type service struct {
	UnimplementedControlServer
	backend Backend
	info    Info
	started time.Time
	// ctx ends with the server: a watch has no end of its own for which GracefulStop could wait.
	ctx  context.Context
	stop context.CancelFunc
}

func (s *service) Status(ctx context.Context, _ *StatusRequest) (*StatusResponse, error) {
	r, err := s.backend.Status(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	r.Version, r.Revision, r.Address = s.info.Version, s.info.Revision, s.info.Address
	r.Pid, r.Started = int64(os.Getpid()), timestamppb.New(s.started)
	return r, nil
}

func (s *service) List(r *ListRequest, stream grpc.ServerStreamingServer[Snapshot]) error {
	return errgrpc.ToGRPC(s.backend.List(stream.Context(), r, stream.Send))
}

func (s *service) Inspect(ctx context.Context, r *InspectRequest) (*InspectResponse, error) {
	if r.GetRef() == "" {
		return nil, errgrpc.ToGRPC(fmt.Errorf("inspect: no image or snapshot is named: %w", errdefs.ErrInvalidArgument))
	}
	return answer(s.backend.Inspect(ctx, r))
}

func (s *service) Why(ctx context.Context, r *WhyRequest) (*WhyResponse, error) {
	if r.GetImage() == "" {
		return nil, errgrpc.ToGRPC(fmt.Errorf("why: no image is named: %w", errdefs.ErrInvalidArgument))
	}
	if p := r.GetPath(); len(p) > 0 && p[0] != '/' {
		return nil, errgrpc.ToGRPC(fmt.Errorf("why: path %q is relative; give it as it is inside the image, from /: %w", r.GetPath(), errdefs.ErrInvalidArgument))
	}
	return answer(s.backend.Why(ctx, r))
}

func (s *service) Usage(ctx context.Context, r *UsageRequest) (*UsageResponse, error) {
	return answer(s.backend.Usage(ctx, r))
}

func (s *service) Watch(r *WatchRequest, stream grpc.ServerStreamingServer[Event]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	err := s.backend.Watch(ctx, r, stream.Send)
	if ctx.Err() != nil {
		return nil
	}
	return errgrpc.ToGRPC(err)
}

func (s *service) Config(context.Context, *ConfigRequest) (*ConfigResponse, error) {
	return &ConfigResponse{Toml: string(s.info.Config)}, nil
}

func answer[T any](m T, err error) (T, error) {
	if err != nil {
		var none T
		return none, errgrpc.ToGRPC(err)
	}
	return m, nil
}
