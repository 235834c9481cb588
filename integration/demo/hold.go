// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// readyFD is where a held demo reports that it is left running.
const readyFD = 3

// takeDownTimeout is above what the rig itself allows its processes to stop.
const takeDownTimeout = time.Minute

// holdInBackground runs the demo in a process of its own session that stays, with the registry in it, when this one
// returns. Until then a signal to this one is passed on.
func holdInBackground(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ready, report, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(self, append([]string{"-held", "-keep"}, os.Args[1:]...)...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, []*os.File{report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	report.Close()
	if err != nil {
		return fmt.Errorf("start the process that stays: %w", err)
	}
	done := make(chan bool, 1)
	go func() {
		line, _ := bufio.NewReader(ready).ReadString('\n') // or the end, which comes with that of the other side
		done <- line != ""
	}()
	for {
		select {
		case left := <-done:
			if left {
				return nil
			}
			_ = cmd.Wait()
			os.Exit(max(1, cmd.ProcessState.ExitCode())) // it has said why
		case <-ctx.Done():
			_ = cmd.Process.Signal(syscall.SIGTERM)
			ctx = context.Background() // once
		}
	}
}

// hold lets go of the terminal, reports, and waits for the end.
func hold(ctx context.Context) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		// A pipe of the caller (`make demo KEEP=1 | tee log`) ends with this.
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	report := os.NewFile(readyFD, "ready")
	if _, err := report.WriteString("left running\n"); err != nil {
		return err
	}
	if err := report.Close(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// clean ends a held demo, or clears away what a killed one has left.
func clean(ctx context.Context, o options) error {
	p, err := openPlace(o.name)
	if errors.Is(err, errBusy) {
		if p.note.Pid <= 1 {
			return fmt.Errorf("a demo is just starting in %s: try again", p.dir)
		}
		if err := unix.Kill(p.note.Pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("end process %d: %w", p.note.Pid, err)
		}
		ctx, cancel := context.WithTimeout(ctx, takeDownTimeout)
		defer cancel()
		err = rig.Await(ctx, func(context.Context) (err error) {
			p, err = openPlace(o.name)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("take down the demo: %w", err)
	}
	if err := p.remove(); err != nil {
		return fmt.Errorf("take down the demo: %w", err)
	}
	fmt.Println("Nothing of the demo is left running or mounted; its files are in", o.out)
	return nil
}
