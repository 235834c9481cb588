// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// freezer is a control group that can be stopped: cgroup v2 (Documentation/admin-guide/cgroup-v2.rst, cgroup.freeze) or the freezer of v1
// (cgroup-v1/freezer-subsystem.rst).
type freezer struct {
	file       string // written to
	on         string
	done       string // read until it says so
	isFrozen   func(string) bool
	wasStopped bool // by somebody else: it stays so
}

const cgroupRoot = "/sys/fs/cgroup"

// freezerOf finds the group of a process. One that holds more than the container is refused: the daemon could freeze itself.
func freezerOf(pid int) (*freezer, error) {
	groups, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return nil, fmt.Errorf("find control group of process %d: %w", pid, err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find own control group: %w", err)
	}
	f, path := chooseFreezer(string(groups), func(p string) bool { _, err := os.Stat(p); return err == nil })
	if f == nil {
		return nil, fmt.Errorf("process %d has no control group that can be frozen: %w", pid, errdefs.ErrFailedPrecondition)
	}
	for l := range strings.Lines(string(own)) {
		if _, p := cutGroup(l); path == "/" || p == path || strings.HasPrefix(p, path+"/") {
			return nil, fmt.Errorf("process %d is in control group %q, which is not of its container alone: %w", pid, path, errdefs.ErrFailedPrecondition)
		}
	}
	state, err := os.ReadFile(f.done)
	if err != nil {
		return nil, fmt.Errorf("read state of control group: %w", err)
	}
	f.wasStopped = f.isFrozen(string(state))
	return f, nil
}

func cutGroup(line string) (controllers, path string) {
	_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
	controllers, path, _ = strings.Cut(rest, ":")
	return controllers, path
}

// chooseFreezer reads /proc/PID/cgroup: "hierarchy:controllers:path".
func chooseFreezer(groups string, exists func(string) bool) (*freezer, string) {
	for l := range strings.Lines(groups) {
		controllers, path := cutGroup(l)
		if path == "" || strings.Contains(path, "..") {
			continue
		}
		switch {
		case controllers == "freezer":
			if file := filepath.Join(cgroupRoot, "freezer", path, "freezer.state"); exists(file) {
				return &freezer{file: file, on: "FROZEN", done: file,
					isFrozen: func(s string) bool { return strings.TrimSpace(s) == "FROZEN" }}, path
			}
		case controllers == "":
			if dir := filepath.Join(cgroupRoot, path); exists(filepath.Join(dir, "cgroup.freeze")) {
				return &freezer{file: filepath.Join(dir, "cgroup.freeze"), on: "1", done: filepath.Join(dir, "cgroup.events"),
					isFrozen: func(s string) bool { return strings.Contains(s, "frozen 1") }}, path
			}
		}
	}
	return nil, ""
}

// freeze stops the group and waits until all of it stands still. On failure it runs again.
func (f *freezer) freeze(ctx context.Context) error {
	if f.wasStopped {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		// v1 has to be asked again while processes are being made.
		if err := os.WriteFile(f.file, []byte(f.on), 0); err != nil {
			return errors.Join(fmt.Errorf("freeze container: %w", err), f.thaw())
		}
		state, err := os.ReadFile(f.done)
		if err != nil {
			return errors.Join(fmt.Errorf("freeze container: %w", err), f.thaw())
		}
		if f.isFrozen(string(state)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("freeze container: it did not stand still: %w", ctx.Err()), f.thaw())
		case <-time.After(wait):
		}
	}
}

func (f *freezer) thaw() error {
	if f.wasStopped {
		return nil
	}
	return thaw(f.file)
}

// thaw is also what the next daemon does with what a killed one has left frozen.
func thaw(file string) error {
	word := "0"
	switch filepath.Base(file) {
	case "cgroup.freeze":
	case "freezer.state":
		word = "THAWED"
	default:
		word = ""
	}
	// What a crash has left of the record of who was frozen must not lead elsewhere.
	if word == "" || !strings.HasPrefix(filepath.Clean(file), cgroupRoot+"/") {
		return fmt.Errorf("thaw container: %.100q is not a file by which control groups are frozen: %w", file, errdefs.ErrDataLoss)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		_, err = f.WriteString(word)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("thaw container: %w", err)
	}
	return nil
}
