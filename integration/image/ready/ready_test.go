// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ready

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// serve lets a program of the test answer each connection, and returns the port.
func serve(t *testing.T, answer func(net.Conn)) int {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			answer(conn)
			_ = conn.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// fixed reads so many bytes and answers.
func fixed(read int, answer string) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := io.ReadFull(c, make([]byte, read)); err == nil {
			_, _ = io.WriteString(c, answer) // the check tells
		}
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestChecks(t *testing.T) {
	connect := 19 // bytes of MQTT's CONNECT
	good := map[string]Check{
		"line": Line(serve(t, fixed(6, "+PONG\r\n")), "PING\r\n", "PONG"),
		"amqp": AMQP(serve(t, fixed(8, "\x01\x00\x00\x00\x00\x01\xff"))),
		"mqtt": MQTT(serve(t, fixed(connect, "\x20\x02\x00\x00"))),
	}
	bad := map[string]Check{
		"line":   Line(serve(t, fixed(6, "-LOADING\r\n")), "PING\r\n", "PONG"),
		"amqp":   AMQP(serve(t, fixed(8, "AMQP\x00\x00\x09\x01"))),
		"mqtt":   MQTT(serve(t, fixed(connect, "\x20\x02\x00\x05"))),
		"closed": Line(serve(t, func(net.Conn) {}), "PING\r\n", "PONG"),
	}
	for name, check := range good {
		require.NoError(t, check(within(t)), name)
	}
	for name, check := range bad {
		require.Error(t, check(within(t)), name)
	}
}

func TestHTTP(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	port := l.Addr().(*net.TCPAddr).Port
	require.NoError(t, HTTP(port, "/ok", 200, "hello")(within(t)))
	require.ErrorContains(t, HTTP(port, "/ok", 200, "bye")(within(t)), "200 OK")
	require.ErrorContains(t, HTTP(port, "/other", 200, "")(within(t)), "404")
	require.NoError(t, HTTP(port, "/other", 404, "")(within(t)))
}

// message is one of PostgreSQL's.
func message(kind byte, body string) string {
	return string(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4))) + body
}

func TestPostgres(t *testing.T) {
	login := len("\x00\x00\x00\x00\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00")
	database := func(row string) func(net.Conn) {
		return func(c net.Conn) {
			fixed(login, message('R', "\x00\x00\x00\x00")+message('S', "a\x00b\x00")+message('Z', "I"))(c)
			fixed(len(message('Q', "select 1\x00")), row+message('C', "SELECT 1\x00")+message('Z', "I"))(c)
		}
	}
	require.NoError(t, Postgres(serve(t, database(message('D', "\x00\x01\x00\x00\x00\x011"))), "postgres")(within(t)))
	require.ErrorContains(t, Postgres(serve(t, database("")), "postgres")(within(t)), "no row")
	for answer, want := range map[string]string{
		message('E', "starting up"):                 "starting up",
		message('R', "\x00\x00\x00\x0a"):            "password",
		"R\xff\xff\xff\xff":                         "message of",
		message('R', "") + message('R', "\x00\x00"): "password",
	} {
		require.ErrorContains(t, Postgres(serve(t, fixed(login, answer)), "postgres")(within(t)), want)
	}
}

func TestMySQL(t *testing.T) {
	packet := func(number byte, body string) string { return string([]byte{byte(len(body)), 0, 0, number}) + body }
	login := 4 + 32 + len("root\x00\x00mysql_native_password\x00")
	query := 4 + len("\x03select 1")
	server := func(first, afterLogin, result string) func(net.Conn) {
		return func(c net.Conn) {
			fixed(0, first)(c)
			fixed(login, afterLogin)(c)
			if afterLogin[4] == 0xfe {
				fixed(4, packet(4, "\x00\x00\x00\x02\x00\x00\x00"))(c)
			}
			fixed(query, result)(c)
		}
	}
	greeting, ok, one := packet(0, "\x0a10.11\x00"), packet(2, "\x00\x00\x00\x02\x00\x00\x00"), packet(1, "\x01")
	require.NoError(t, MySQL(serve(t, server(greeting, ok, one)), "root")(within(t)))
	require.NoError(t, MySQL(serve(t, server(greeting, packet(2, "\xfeunix_socket\x00"), one)), "root")(within(t)))
	require.ErrorContains(t, MySQL(serve(t, server(packet(0, "\xffblocked"), ok, one)), "root")(within(t)), "blocked")
	require.ErrorContains(t, MySQL(serve(t, server(greeting, packet(2, "\xffdenied"), one)), "root")(within(t)), "denied")
	require.ErrorContains(t, MySQL(serve(t, server(greeting, ok, packet(1, "\xffno"))), "root")(within(t)), "no")
}

// TestAwaitIsInTheNamespace needs root: a port of this machine is not one of a new network.
func TestAwaitIsInTheNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("entering a network namespace needs root")
	}
	var asked atomic.Int32
	port := serve(t, func(c net.Conn) {
		if asked.Add(1) < 3 {
			return
		}
		fixed(1, "yes\n")(c)
	})
	require.NoError(t, Await(within(t), os.Getpid(), Line(port, "?", "yes"), time.Millisecond))
	require.EqualValues(t, 3, asked.Load())

	child := newNetwork(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := Await(ctx, child, Line(port, "?", "yes"), time.Millisecond)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.EqualValues(t, 3, asked.Load())
}

// newNetwork starts a process in a network namespace of its own.
func newNetwork(t *testing.T) (pid int) {
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait() // killed
	})
	return cmd.Process.Pid
}
