// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Process is one process, for ever: a pid alone may come again.
type Process struct {
	Pid   int    `json:"pid"`
	Start string `json:"start"` // in ticks since boot (proc(5))
	Boot  string `json:"boot"`
}

var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

func startOf(pid int) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", err
	}
	// The name, in parentheses, may hold anything. State is field 3, the start field 22. A zombie has no memory any more.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return "", os.ErrProcessDone
	}
	return f[19], nil
}

// processOf names a process that runs now.
func processOf(pid int) (Process, error) {
	start, err := startOf(pid)
	if pid <= 0 || err != nil {
		return Process{}, fmt.Errorf("process %d is not there: %w", pid, errdefs.ErrFailedPrecondition)
	}
	return Process{pid, start, bootID()}, nil
}

// Alive tells whether it still runs.
func (p Process) Alive() bool {
	if p.Pid <= 0 || p.Boot != bootID() {
		return false
	}
	start, err := startOf(p.Pid)
	return err == nil && start == p.Start
}
