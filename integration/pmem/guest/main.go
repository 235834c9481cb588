// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command guest is the first process of the emulated machine. It makes the two tiers, runs containerd with nhybrid on them, and
// writes to the second serial port first the names of all its checks and then the result of each. Logs go to the console.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/pmem/internal/manifest"
)

// checkTimeout ends a check that hangs, long before the host gives the whole boot up. The slowest one takes some seconds.
const checkTimeout = 5 * time.Minute

// check is one thing that must hold. Where a fatal one does not, those after it make no sense.
type check struct {
	name  string
	fatal bool
	run   func(context.Context) error
}

// guest is the state of the machine under test.
type guest struct {
	results                             *os.File
	fs, boot, snapshotter, registryHost string
	domain                              string            // persistence domain that the host emulates; empty: none is told
	said                                map[string]uint64 // transactions that the ledgers had promised before this boot
	expected                            manifest.Tree     // what a container of the image sees
	pmem                                []span            // physical addresses of the persistent memory
	containerd, daemon                  *service
}

func main() {
	g := &guest{}
	if err := g.begin(); err != nil {
		fmt.Printf("guest: %v\n", err)
		g.say("FAIL begin: %s", oneLine(err))
		powerOff()
	}
	boot, ok := map[string]struct {
		checks []check
		cut    string // when the power is to go
	}{
		"first":        {g.first(), "working"},
		"cut-working":  {g.cutWorking(), "working"},
		"cut-starting": {g.cutStarting(), "starting"},
		"second":       {g.second(), ""},
	}[g.boot]
	if !ok {
		g.say("FAIL begin: boot %q is not known", g.boot)
		powerOff()
	}
	checks := boot.checks
	names := make([]string, 0, len(checks))
	for _, c := range checks {
		names = append(names, c.name)
	}
	g.say("plan %s", strings.Join(names, " "))
	good, alive := g.all(checks)
	if !good {
		g.dumpLogs()
	}
	if alive && boot.cut != "" {
		if !g.nhybrid() {
			boot.cut = "now"
		}
		g.say("kill %s", boot.cut)
		if boot.cut == "starting" {
			err := g.startLedgersAgain(context.Background())
			fmt.Printf("guest: start ledgers: %v\n", err)
		}
		// Nothing may be flushed from here on by an orderly end: the host takes the power away.
		for {
			_ = unix.Pause()
		}
	}
	g.say("done")
	powerOff()
}

// all makes the checks and reports each; it tells if all of them hold, and if it makes sense to go on.
func (g *guest) all(checks []check) (good, alive bool) {
	good, broken := true, ""
	for _, c := range checks {
		if broken != "" {
			g.say("FAIL %s: not tried, since %s failed", c.name, broken)
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
		start := time.Now()
		err := c.run(ctx)
		cancel()
		fmt.Printf("guest: %s: %v in %v\n", c.name, err, time.Since(start).Round(time.Millisecond))
		if err == nil {
			g.say("ok %s", c.name)
			continue
		}
		good = false
		g.say("FAIL %s: %s", c.name, oneLine(err))
		if c.fatal {
			broken = c.name
		}
	}
	return good, broken == ""
}

// begin mounts what every system has and reads what the host wants.
func (g *guest) begin() error {
	for _, m := range []struct{ source, target, fs, data string }{
		{"dev", "/dev", "devtmpfs", ""}, {"proc", "/proc", "proc", ""}, {"sys", "/sys", "sysfs", ""},
		{"cgroup", "/sys/fs/cgroup", "cgroup2", ""}, {"run", "/run", "tmpfs", "mode=755"}, {"tmp", "/tmp", "tmpfs", ""}, {"var", "/var", "tmpfs", "mode=755"},
	} {
		if err := unix.Mount(m.source, m.target, m.fs, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	os.Setenv("PATH", "/bin:/sbin")
	results, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("open second serial port: %w", err)
	}
	g.results = results
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("read kernel command line: %w", err)
	}
	for _, arg := range strings.Fields(string(cmdline)) {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "nhybrid.fs":
			g.fs = value
		case "nhybrid.boot":
			g.boot = value
		case "nhybrid.snapshotter":
			g.snapshotter = value
		case "nhybrid.domain":
			g.domain = value
		case "nhybrid.said":
			if g.said, err = readSaid(value); err != nil {
				return err
			}
		case "nhybrid.registry":
			g.registryHost = value
		}
	}
	expected, err := os.ReadFile("/etc/expected.json")
	if err != nil {
		return fmt.Errorf("read expected tree: %w", err)
	}
	if err := json.Unmarshal(expected, &g.expected); err != nil {
		return fmt.Errorf("read expected tree: %w", err)
	}
	for _, args := range [][]string{
		{"ip", "link", "set", "lo", "up"}, {"ip", "link", "set", "eth0", "up"},
		{"ip", "addr", "add", "10.0.2.15/24", "dev", "eth0"},
	} {
		if _, err := output(context.Background(), "busybox", args...); err != nil {
			return fmt.Errorf("set up network: %w", err)
		}
	}
	return nil
}

// readSaid reads pairs of language and number, as in go:12,c:7.
func readSaid(text string) (map[string]uint64, error) {
	said := map[string]uint64{}
	for pair := range strings.SplitSeq(text, ",") {
		language, number, _ := strings.Cut(pair, ":")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read promises %q: %w", text, err)
		}
		said[language] = n
	}
	return said, nil
}

// say writes one line to the host.
func (g *guest) say(format string, args ...any) {
	if g.results != nil {
		fmt.Fprintf(g.results, format+"\n", args...)
	}
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func powerOff() {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Printf("guest: power off: %v\n", err)
	for {
		_ = unix.Pause()
	}
}
