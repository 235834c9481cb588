// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ready asks programs in containers whether they serve, as a client would: from the network namespace of the
// container, in the program's own protocol, and without a file of the container being opened for it.
package ready

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/thread"
)

// Check is nil when the program has given the right answer. It runs in the network namespace of the container and
// connects to 127.0.0.1.
type Check func(ctx context.Context) error

// attemptTimeout bounds one question: a program that has accepted a connection may be far from answering.
const attemptTimeout = 10 * time.Second

// Await asks in the network namespace of a process, each interval anew, until the answer is nil or the context ends,
// whose error then comes with the last answer.
func Await(ctx context.Context, pid int, check Check, interval time.Duration) (err error) {
	thread.Run(func() { err = awaitHere(ctx, pid, check, interval) })
	return err
}

func awaitHere(ctx context.Context, pid int, check Check, interval time.Duration) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return fmt.Errorf("enter network of process: %w", err)
	}
	err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
	if err = errors.Join(err, ns.Close()); err != nil {
		return fmt.Errorf("enter network of process %d: %w", pid, err)
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := check(attempt)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w; the last answer: %w", ctx.Err(), err)
		}
	}
}

// dial connects in the calling thread, so that the socket is of its network namespace: one address of one family makes
// net.Dialer start no goroutine for the connect.
func dial(ctx context.Context, port int) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	return conn, nil
}

// talk connects, lets the program be spoken to, and hangs up.
func talk(port int, speak func(net.Conn) error) Check {
	return func(ctx context.Context) error {
		conn, err := dial(ctx, port)
		if err != nil {
			return err
		}
		err = speak(conn)
		if tcp, ok := conn.(*net.TCPConn); ok {
			// Closed connections that linger would use up the ports where the right answer is long in coming.
			err = errors.Join(err, tcp.SetLinger(0))
		}
		_ = conn.Close() // what was to be known is known
		return err
	}
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 1 << 20

// HTTP wants a status and a text in the body ("" is in all).
func HTTP(port int, path string, status int, text string) Check {
	return talk(port, func(conn net.Conn) error {
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path); err != nil {
			return err
		}
		answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxAnswer)), nil)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(answer.Body)
		if err = errors.Join(err, answer.Body.Close()); err != nil {
			return err
		}
		if answer.StatusCode != status || !bytes.Contains(body, []byte(text)) {
			return fmt.Errorf("GET %s: %s: %.200q", path, answer.Status, body)
		}
		return nil
	})
}

// Line sends a question and wants an answer of which the first line holds a text.
func Line(port int, question, text string) Check {
	return talk(port, func(conn net.Conn) error {
		if _, err := io.WriteString(conn, question); err != nil {
			return err
		}
		line, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadString('\n')
		if err != nil {
			return err
		}
		if !strings.Contains(line, text) {
			return fmt.Errorf("%q was answered with %.200q", question, line)
		}
		return nil
	})
}

// Bytes sends a question and wants an answer that begins with the given bytes.
func Bytes(port int, question, answer []byte) Check {
	return talk(port, func(conn net.Conn) error {
		if _, err := conn.Write(question); err != nil {
			return err
		}
		got := make([]byte, len(answer))
		if _, err := io.ReadFull(conn, got); err != nil {
			return err
		}
		if !bytes.Equal(got, answer) {
			return fmt.Errorf("%q was answered with %q, not %q", question, got, answer)
		}
		return nil
	})
}

// AMQP wants the broker to open the handshake of AMQP 0-9-1: a method frame (type 1) of channel 0.
func AMQP(port int) Check {
	return Bytes(port, []byte("AMQP\x00\x00\x09\x01"), []byte{1, 0, 0})
}

// MQTT wants a CONNACK without objection to an anonymous CONNECT (MQTT 3.1.1, sections 3.1 and 3.2).
func MQTT(port int) Check {
	connect := []byte("\x10\x11\x00\x04MQTT\x04\x02\x00\x3c\x00\x05check")
	return Bytes(port, connect, []byte{0x20, 2, 0, 0})
}
