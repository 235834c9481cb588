// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"

	"github.com/nhybrid/nhybrid/integration/bench/scm/wire"
)

// worker is a running worker of package wire, on the host or in a container.
type worker struct {
	name  string
	hello wire.Hello
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	log   bytes.Buffer // standard error
}

// stopTimeout is how long a worker, with its container, has to end.
const stopTimeout = 20 * time.Second

// launch starts a worker and waits until it has said what it found.
func launch(name string, cmd *exec.Cmd) (*worker, error) {
	w := &worker{name: name, cmd: cmd}
	fail := func(err error) (*worker, error) {
		return nil, errors.Join(fmt.Errorf("start worker %s: %w: %s", name, err, bytes.TrimSpace(w.log.Bytes())), w.stop())
	}
	var err error
	if w.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.out = bufio.NewReader(out)
	cmd.Stderr = &w.log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start worker %s: %w", name, err)
	}
	if err := w.read(&w.hello); err != nil {
		return fail(err)
	}
	if w.hello.Error != "" {
		return fail(errors.New(w.hello.Error))
	}
	return w, nil
}

func (w *worker) read(v any) error {
	line, err := w.out.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if err := json.Unmarshal(line, v); err != nil {
		return fmt.Errorf("answer %.200q: %w", line, err)
	}
	return nil
}

// do lets the worker do n operations and returns the nanoseconds that each took.
func (w *worker) do(op string, n, warm int) (float64, error) {
	fail := func(err error) (float64, error) { return 0, fmt.Errorf("worker %s, %s: %w", w.name, op, err) }
	b, err := json.Marshal(wire.Request{Op: op, N: n, Warm: warm})
	if err != nil {
		return fail(err)
	}
	if _, err := w.in.Write(append(b, '\n')); err != nil {
		return fail(err)
	}
	var r wire.Reply
	if err := w.read(&r); err != nil {
		return fail(fmt.Errorf("%w: %s", err, bytes.TrimSpace(w.log.Bytes())))
	}
	if r.Error != "" {
		return fail(errors.New(r.Error))
	}
	if n < 1 || r.NS < 1 {
		return fail(fmt.Errorf("%d operations in %d ns", n, r.NS))
	}
	return float64(r.NS) / float64(n), nil
}

// stop ends it: a worker closes its region and goes when nothing more is asked of it.
func (w *worker) stop() error {
	_ = w.in.Close()
	late := time.AfterFunc(stopTimeout, func() { _ = w.cmd.Process.Kill() })
	defer late.Stop()
	if err := w.cmd.Wait(); err != nil {
		return fmt.Errorf("stop worker %s: %w: %s", w.name, err, bytes.TrimSpace(w.log.Bytes()))
	}
	return nil
}
