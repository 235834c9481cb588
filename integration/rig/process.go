// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// stopTimeout is how long a process has to end after SIGTERM before it is killed.
const stopTimeout = 10 * time.Second

// Process is a program that the rig runs in the background, with a log file. It can be stopped and started again.
type Process struct {
	name    string
	args    []string
	env     []string
	logPath string
	keep    bool
	files   []*os.File                  // passed on as sd_listen_fds(3) says
	ready   func(context.Context) error // asked until it answers nil

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended; nil before the first start
	end  error
}

// Start starts the process and waits until it is ready. Its log is appended to.
func (p *Process) Start(ctx context.Context) error {
	p.mu.Lock()
	if p.running() {
		p.mu.Unlock()
		return fmt.Errorf("start %s: it runs already", p.name)
	}
	err := p.spawn()
	done := p.done
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	// A deadline of its own: a rig of a test often has none before the test's.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = poll(ctx, func(ctx context.Context) error {
		select {
		case <-done:
			return stop{fmt.Errorf("it ended: %w", p.end)}
		default:
			// Clients may wait for a server until their time is over, and this one may never come.
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return p.ready(ctx)
		}
	})
	if err != nil {
		return errors.Join(fmt.Errorf("start %s: %w; the end of %s:\n%s", p.name, err, p.logPath, p.LogTail(2000)), p.Kill())
	}
	return nil
}

// spawn forks the process. p.mu is held.
func (p *Process) spawn() error {
	if err := os.MkdirAll(filepath.Dir(p.logPath), 0o755); err != nil {
		return err
	}
	logFile, err := os.OpenFile(p.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	args := p.args
	if len(p.files) > 0 { // who is meant is said by the process itself: its number is not known before
		args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), p.env...)
	if cmd.ExtraFiles = p.files; len(p.files) > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(p.files)))
	}
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if !p.keep {
		// Nothing outlives a test binary that is killed.
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	started, done := make(chan error), make(chan struct{})
	go func() {
		// "Death of the parent" means the death of the thread that forked (prctl(2)), so that one has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		p.end = err
		close(done)
	}()
	if err := <-started; err != nil {
		return err
	}
	p.cmd, p.done = cmd, done
	return nil
}

// running is called with p.mu held.
func (p *Process) running() bool {
	if p.done == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Running says if the process runs.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running()
}

// Pid is the number of the running process, 0 if it does not run.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running() {
		return 0
	}
	return p.cmd.Process.Pid
}

// Stop ends the process with SIGTERM, and with SIGKILL after ten seconds, which is an error.
func (p *Process) Stop() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running() {
		return nil
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
	}
	return errors.Join(fmt.Errorf("stop %s: still running %v after SIGTERM, killed", p.name, stopTimeout), p.kill())
}

// Kill ends the process with SIGKILL, as a crash would, and waits until it is gone.
func (p *Process) Kill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kill()
}

func (p *Process) kill() error {
	if !p.running() {
		return nil
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// Restart stops the process and starts it again.
func (p *Process) Restart(ctx context.Context) error {
	if err := p.Stop(); err != nil {
		return err
	}
	return p.Start(ctx)
}

// LogPath is the file with everything the process has written.
func (p *Process) LogPath() string { return p.logPath }

// Log returns everything that the process has written so far.
func (p *Process) Log() string {
	b, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// LogTail returns about the last n bytes of the log, whole lines.
func (p *Process) LogTail(n int) string {
	b := []byte(p.Log())
	if len(b) > n {
		b = b[len(b)-n:]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return string(b)
}

// stop is an error that makes polling vain.
type stop struct{ error }

func (s stop) Unwrap() error { return s.error }

// poll asks until the answer is nil, a stop, or the context ends.
func poll(ctx context.Context, ask func(context.Context) error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		var s stop
		if err == nil || errors.As(err, &s) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w; the last answer: %w", ctx.Err(), err)
		}
	}
}

// Await asks every 10 ms until the answer is nil or the context ends, whose error then comes with the last answer.
func Await(ctx context.Context, ask func(context.Context) error) error { return poll(ctx, ask) }
