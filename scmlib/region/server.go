// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// Handler does one operation. Files that it returns go with the reply and are closed.
type Handler func(ctx context.Context, args json.RawMessage, files []*os.File) (result any, out []*os.File, err error)

// Server answers hook and operator on a unix socket.
type Server struct {
	handlers map[string]Handler
	refuse   error // of Refusal
}

// NewServer serves the operations of a store. More are added with Handle.
func NewServer(s *Store) *Server {
	srv := &Server{handlers: map[string]Handler{}}
	srv.Handle(api.OpAttach, s.serveAttach)
	s.serveOperator(srv)
	return srv
}

// Refusal answers every operation with an error: who asks where no regions are served is told why, rather than waiting at a socket that the service manager holds.
func Refusal(err error) *Server { return &Server{refuse: err} }

// Handle adds an operation. It must not be called once Serve runs.
func (srv *Server) Handle(op string, h Handler) { srv.handlers[op] = h }

// Plain makes a handler of a function whose arguments and result are JSON.
func Plain[A, R any](fn func(context.Context, A) (R, error)) Handler {
	return func(ctx context.Context, args json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var a A
		if err := json.Unmarshal(args, &a); err != nil {
			return nil, nil, fmt.Errorf("arguments: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		r, err := fn(ctx, a)
		return r, nil, err
	}
}

// acceptAgain is the pause before the next try where descriptors or memory were short.
const acceptAgain = 100 * time.Millisecond

// Serve answers until ctx ends or the listener is closed, then waits for what is being done, whose context ends.
func (srv *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			if short := []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED}; slices.ContainsFunc(short, func(e error) bool { return errors.Is(err, e) }) {
				log.G(ctx).WithError(err).Error("a call about regions is not answered yet")
				select {
				case <-time.After(acceptAgain):
				case <-ctx.Done():
				}
				continue
			}
			return fmt.Errorf("accept on %q: %w", l.Addr(), err)
		}
		c, ok := conn.(*net.UnixConn)
		if !ok {
			conn.Close()
			return fmt.Errorf("regions are served on unix sockets, not on %q: %w", l.Addr().Network(), errdefs.ErrInvalidArgument)
		}
		calls.Go(func() { srv.serveConn(ctx, c) })
	}
}

func (srv *Server) serveConn(ctx context.Context, conn *net.UnixConn) {
	// The hook's process has the connection as long as it waits; when it is killed, what it waits for ends.
	f, err := conn.File()
	conn.Close()
	if err != nil {
		return
	}
	defer f.Close()
	fd := int(f.Fd()) // blocking from here on
	// A peer that says nothing must not keep a place for ever.
	patience := unix.Timeval{Sec: 10}
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience)
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return
	}
	var q api.Request
	files, err := api.Read(fd, &q)
	if err != nil {
		return
	}
	defer api.CloseAll(files)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // nothing more is read but its end
		for {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			if n, err := unix.Poll(p, 100); ctx.Err() != nil {
				return
			} else if err == nil && n > 0 {
				cancel()
				return
			}
		}
	}()
	result, out, err := srv.do(ctx, peer, &q, files)
	defer api.CloseAll(out)
	var reply api.Reply
	if err == nil {
		reply.Result, err = json.Marshal(result)
	}
	if err != nil {
		reply = api.Reply{Error: err.Error(), Class: class(err)}
	}
	if err := api.Write(fd, reply, out...); err != nil {
		log.G(ctx).WithError(err).WithField("op", q.Op).Debug("nobody waits for the answer")
	}
}

func (srv *Server) do(ctx context.Context, peer *unix.Ucred, q *api.Request, files []*os.File) (any, []*os.File, error) {
	if peer.Uid != 0 {
		return nil, nil, fmt.Errorf("uid %d may not ask for regions: %w", peer.Uid, errdefs.ErrPermissionDenied)
	}
	if q.Version != api.Version {
		return nil, nil, fmt.Errorf("version %d of the protocol, the daemon speaks %d: use hook and tool of its release: %w", q.Version, api.Version, errdefs.ErrNotImplemented)
	}
	if srv.refuse != nil {
		return nil, nil, srv.refuse
	}
	h := srv.handlers[q.Op]
	if h == nil {
		return nil, nil, fmt.Errorf("operation %.40q: %w", q.Op, errdefs.ErrNotImplemented)
	}
	began := time.Now()
	result, out, err := h(ctx, q.Args, files)
	entry := log.G(ctx).WithFields(log.Fields{"op": q.Op, "took": time.Since(began).Round(time.Microsecond)})
	if err != nil {
		entry.WithError(err).Warn("region request failed")
	} else {
		entry.Debug("region request")
	}
	return result, out, err
}

var classes = []struct {
	name string
	is   error
}{
	{"not found", errdefs.ErrNotFound}, {"already exists", errdefs.ErrAlreadyExists}, {"invalid argument", errdefs.ErrInvalidArgument},
	{"resource exhausted", errdefs.ErrResourceExhausted}, {"failed precondition", errdefs.ErrFailedPrecondition}, {"data loss", errdefs.ErrDataLoss},
	{"unavailable", errdefs.ErrUnavailable}, {"permission denied", errdefs.ErrPermissionDenied}, {"not implemented", errdefs.ErrNotImplemented},
}

func class(err error) string {
	for _, c := range classes {
		if errors.Is(err, c.is) {
			return c.name
		}
	}
	return ""
}

// ErrorOf gives an error of the daemon back its class.
func ErrorOf(err error) error {
	var e *api.Error
	if errors.As(err, &e) {
		for _, c := range classes {
			if e.Class == c.name {
				return &classed{e.Message, c.is}
			}
		}
	}
	return err
}

type classed struct {
	message string
	class   error
}

func (c *classed) Error() string { return c.message }
func (c *classed) Unwrap() error { return c.class }

func (s *Store) serveAttach(ctx context.Context, args json.RawMessage, files []*os.File) (any, []*os.File, error) {
	var a api.Attach
	if err := json.Unmarshal(args, &a); err != nil {
		return nil, nil, fmt.Errorf("arguments: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var image *os.File
	if len(files) > 0 {
		image = files[0]
	}
	mount, r, err := s.Attach(ctx, a, image)
	if err != nil {
		return nil, nil, err
	}
	return r, []*os.File{mount}, nil
}
