// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func serve(t *testing.T, s *Store, more map[string]Handler) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	srv := NewServer(s)
	for op, h := range more {
		srv.Handle(op, h)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); require.NoError(t, <-done) })
	return socket
}

// short is a listener for which descriptors are short once.
type short struct {
	net.Listener
	met atomic.Bool
}

func (l *short) Accept() (net.Conn, error) {
	if l.met.CompareAndSwap(false, true) {
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", unix.EMFILE)}
	}
	return l.Listener.Accept()
}

// Hooks of containers wait for an answer: one failure to take a call ends none of the others.
func TestServesOnAfterAShortage(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(newStore(t, Options{})).Serve(ctx, &short{Listener: l}) }()
	t.Cleanup(func() { cancel(); require.NoError(t, <-done) })
	var all Listing
	_, err = api.Call(socket, OpList, Args{}, &all)
	require.NoError(t, err)
}

func TestProtocol(t *testing.T) {
	s := newStore(t, Options{})
	socket := serve(t, s, nil)
	var r Record
	_, err := api.Call(socket, OpCreate, Args{Namespace: "default", Region: "a", Create: CreateOptions{Size: mib}}, &r)
	require.NoError(t, err)
	require.EqualValues(t, mib, r.Size)
	_, err = api.Call(socket, OpCreate, Args{Namespace: "default", Region: "a", Create: CreateOptions{Size: mib}}, &r)
	require.True(t, errdefs.IsAlreadyExists(ErrorOf(err)), "%v", err)
	put(t, s.data(r.Ref), 3)

	// Streams go through pipes.
	in, out, err := os.Pipe()
	require.NoError(t, err)
	got := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(in)
		got <- b
	}()
	_, err = api.Call(socket, OpExport, Args{Namespace: "default", Region: "a"}, nil, out)
	require.NoError(t, err)
	require.NoError(t, out.Close())
	b := <-got
	in, out, err = os.Pipe()
	require.NoError(t, err)
	go func() { _, _ = io.Copy(out, bytes.NewReader(b)); out.Close() }()
	_, err = api.Call(socket, OpImport, Args{Namespace: "default", Region: "b"}, &r, in)
	require.NoError(t, err)
	n, _ := get(t, s.data(r.Ref))
	require.EqualValues(t, 3, n)

	var l Listing
	_, err = api.Call(socket, OpList, Args{}, &l)
	require.NoError(t, err)
	require.Len(t, l.Regions, 2)
	var space Space
	_, err = api.Call(socket, OpBooks, Args{}, &space)
	require.NoError(t, err)
	require.EqualValues(t, 2*mib, space.Promised)
	files, err := api.Call(socket, api.OpAttach, api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Size: mib}, &r)
	require.NoError(t, err)
	require.Len(t, files, 1)
	api.CloseAll(files)
	_, err = api.Call(socket, "nonsense", nil, nil)
	require.True(t, errdefs.IsNotImplemented(ErrorOf(err)), "%v", err)
	_, err = api.Call(socket+"no", "list", nil, nil)
	require.ErrorContains(t, err, "it does not run, or gives no regions")
}

// A program of the host has a volume as a container would, for as long as it runs.
func TestUseByHost(t *testing.T) {
	s := newStore(t, Options{})
	socket := serve(t, s, nil)
	r, err := s.Create(t.Context(), "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	one := sleeper(t)
	files, err := api.Call(socket, OpUse, Args{Namespace: "default", Region: "a", Pid: one.Process.Pid}, nil)
	require.NoError(t, err)
	require.Len(t, files, 1)
	defer api.CloseAll(files)
	put(t, fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()), 8)
	n, _ := get(t, s.data(r.Ref))
	require.EqualValues(t, 8, n)
	_, err = api.Call(socket, api.OpAttach, api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Volume: "a"}, nil)
	require.ErrorContains(t, err, "of the host) uses it")
	end(one)
	files2, err := api.Call(socket, api.OpAttach, api.Attach{Namespace: "default", Container: "c", Pid: sleeper(t).Process.Pid, Volume: "a"}, nil)
	require.NoError(t, err)
	api.CloseAll(files2)
}

// Who is not root gets nothing, even where the socket is open to all.
func TestOnlyRoot(t *testing.T) {
	socket := serve(t, newStore(t, Options{}), nil)
	for dir := filepath.Dir(socket); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		require.NoError(t, os.Chmod(dir, 0o755))
	}
	require.NoError(t, os.Chmod(socket, 0o666))
	// A thread that is left behind with another uid ends with its goroutine.
	got := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if _, _, e := unix.RawSyscall(unix.SYS_SETUID, 65534, 0, 0); e != 0 {
			got <- e
			return
		}
		_, err := api.Call(socket, OpList, Args{}, nil)
		got <- err
	}()
	err := ErrorOf(<-got)
	require.True(t, errdefs.IsPermissionDenied(err), "%v", err)
	require.ErrorContains(t, err, "uid 65534 may not ask for regions")
}

// Peers that send nonsense, too much, or nothing get nothing and leave nothing.
func TestProtocolNonsense(t *testing.T) {
	socket := serve(t, newStore(t, Options{}), nil)
	before := countFiles(t)
	for _, b := range [][]byte{
		{}, {1}, {0xff, 0xff, 0xff, 0xff}, {4, 0, 0, 0, 'a', 'b', 'c', 'd'}, []byte("\x02\x00\x00\x00{}"), []byte("\x64\x00\x00\x00{"),
		frame(t, api.Request{Version: 2, Op: OpList}), frame(t, api.Request{Version: 1, Op: OpInspect, Args: json.RawMessage(`{"region":7}`)}),
		frame(t, api.Request{Version: 1, Op: OpExport, Args: json.RawMessage(`{}`)}),
	} {
		c, err := net.Dial("unix", socket)
		require.NoError(t, err)
		u := c.(*net.UnixConn)
		// Files that nobody asked for.
		_, _, err = u.WriteMsgUnix(b, unix.UnixRights(0, 0), nil)
		require.NoError(t, err)
		require.NoError(t, u.CloseWrite())
		_, _ = io.ReadAll(u)
		require.NoError(t, c.Close())
	}
	require.Eventually(t, func() bool { return countFiles(t) <= before }, waitFor, tick, "files are left open")
}

func frame(t *testing.T, q api.Request) []byte {
	t.Helper()
	b, err := json.Marshal(q)
	require.NoError(t, err)
	return append([]byte{byte(len(b)), 0, 0, 0}, b...)
}

func countFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(fds)
}

// Whoever asks and goes away stops what it asked for.
func TestGoneCallerCancels(t *testing.T) {
	cancelled := make(chan struct{})
	began := make(chan struct{})
	socket := serve(t, newStore(t, Options{}), map[string]Handler{"hang": func(ctx context.Context, _ json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		close(began)
		<-ctx.Done()
		close(cancelled)
		return nil, nil, ctx.Err()
	}})
	c, err := net.Dial("unix", socket)
	require.NoError(t, err)
	_, err = c.Write(frame(t, api.Request{Version: 1, Op: "hang"}))
	require.NoError(t, err)
	<-began
	require.NoError(t, c.Close())
	<-cancelled
}
