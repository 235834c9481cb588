// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package result

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is what of the machine bears on the figures.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory_bytes"`
	OS     string `json:"os"`
	// Load is the load average over a minute, before the first run and after the last.
	LoadBefore float64 `json:"load_before"`
	LoadAfter  float64 `json:"load_after"`
}

func (m Machine) String() string {
	return fmt.Sprintf("%s, Linux %s, %d x %s, %.0f GB, load %.1f before and %.1f after",
		m.OS, m.Kernel, m.CPUs, m.CPU, float64(m.Memory)/1e9, m.LoadBefore, m.LoadAfter)
}

// ThisMachine looks at the machine before the first run.
func ThisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), LoadBefore: Load(), CPU: runtime.GOARCH, OS: runtime.GOOS}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		m.Memory = int64(s.Totalram) * int64(s.Unit)
	}
	m.CPU = field("/proc/cpuinfo", "model name", ":", m.CPU)
	m.OS = strings.Trim(field("/etc/os-release", "PRETTY_NAME", "=", m.OS), `"`)
	return m
}

// Load is the load average over the last minute.
func Load() float64 {
	var load float64
	b, _ := os.ReadFile("/proc/loadavg")
	_, _ = fmt.Sscan(string(b), &load) // 0 where it is not told
	return load
}

// field is the value of the first line "key separator value" in a file.
func field(path, key, separator, missing string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return missing
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, separator); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return missing
}

// Versions asks programs in a directory for their --version and takes the last word that looks like one, or the
// whole first line. Go's own version and the revision of the repository come with it.
func Versions(ctx context.Context, bin string, programs ...string) (map[string]string, error) {
	v := map[string]string{"go": runtime.Version()}
	for _, p := range programs {
		out, err := exec.CommandContext(ctx, filepath.Join(bin, p), "--version").Output()
		if err != nil {
			return nil, fmt.Errorf("ask %s for its version: %w", p, err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		v[p] = line
		words := strings.Fields(line)
		for _, w := range words {
			if strings.ContainsAny(w, "0123456789") && strings.ContainsAny(w, ".-") && !strings.Contains(w, "/") && w != p {
				v[p] = w
				break
			}
		}
		if v[p] == line && len(words) > 0 {
			v[p] = words[len(words)-1]
		}
	}
	if out, err := exec.CommandContext(ctx, "git", "-C", bin, "describe", "--tags", "--always", "--dirty").Output(); err == nil {
		v["nhybrid"] = strings.TrimSpace(string(out))
	}
	return v, nil
}
