// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	socket  = "/run/containerd/containerd.sock"
	logDir  = "/run/log"
	pollGap = 50 * time.Millisecond
)

// output runs a command and returns what it wrote to both outputs.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("run %q: %w: %s", strings.Join(append([]string{filepath.Base(name)}, args...), " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// ctr runs containerd's own client.
func ctr(ctx context.Context, args ...string) (string, error) {
	return output(ctx, "ctr", append([]string{"--address", socket}, args...)...)
}

// poll tries until the condition holds; the error is that of the last try that came to its end.
func poll(ctx context.Context, try func() error) error {
	var last error
	for {
		err := try()
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; at last: %w", ctx.Err(), last)
		case <-time.After(pollGap):
		}
	}
}

// service is a program that runs on.
type service struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the program has ended
}

// startService starts a program whose output goes to a log of its name, and waits until ready says so.
func startService(ctx context.Context, ready func() error, name string, args ...string) (*service, error) {
	if err := os.MkdirAll(logDir, 0o755); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	log, err := os.OpenFile(filepath.Join(logDir, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	s := &service{name: name, cmd: exec.Command(name, args...), done: make(chan struct{})}
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = s.cmd.Wait()
		close(s.done)
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-s.done:
			cancel(fmt.Errorf("it ended with %v", s.cmd.ProcessState))
		case <-ctx.Done():
		}
	}()
	if err := poll(ctx, ready); err != nil {
		return nil, fmt.Errorf("start %s: %w: %w", name, context.Cause(ctx), err)
	}
	return s, nil
}

// end sends a signal and waits for the program to go.
func (s *service) end(ctx context.Context, signal os.Signal) error {
	if err := s.cmd.Process.Signal(signal); err != nil {
		return fmt.Errorf("end %s: %w", s.name, err)
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end %s with %v: %w", s.name, signal, ctx.Err())
	}
}

// startContainerd starts containerd and waits until it answers.
func (g *guest) startContainerd(ctx context.Context) (err error) {
	g.containerd, err = startService(ctx, func() error {
		_, err := ctr(ctx, "version")
		return err
	}, "containerd")
	return err
}

// startDaemon starts nhybrid's snapshotter and waits until it answers.
func (g *guest) startDaemon(ctx context.Context) (err error) {
	g.daemon, err = startService(ctx, func() error {
		_, err := g.status(ctx)
		return err
	}, "containerd-nhybrid-grpc")
	return err
}

// dumpLogs copies the logs and the kernel's messages to the console, which the host keeps.
func (g *guest) dumpLogs() {
	if g.daemon != nil {
		// What a daemon that hangs waits for.
		_ = g.daemon.cmd.Process.Signal(syscall.SIGQUIT)
		select {
		case <-g.daemon.done:
		case <-time.After(10 * time.Second):
		}
	}
	names, err := filepath.Glob(filepath.Join(logDir, "*"))
	if err != nil {
		return
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		fmt.Printf("guest: log of %s (%v):\n%s\n", filepath.Base(name), err, data[max(0, len(data)-64<<10):])
	}
	messages, err := output(context.Background(), "busybox", "dmesg")
	fmt.Printf("guest: messages of the kernel (%v):\n%s\n", err, messages[max(0, len(messages)-16<<10):])
	mounts, err := os.ReadFile("/proc/mounts")
	fmt.Printf("guest: mounts (%v):\n%s\n", err, mounts)
}

var errNone = errors.New("there are none")
