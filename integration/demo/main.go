// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command demo pulls an image of Debian packages through a slow link into two tiers, shows what goes where while it
// happens, runs a container from it and leaves nothing behind. `make demo` runs it, as root, in the repository.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// options are the flags; make passes its variables by the environment.
type options struct {
	keep, clean, tiny, held bool
	nvm, hdd                string
	policy, rate, out, name string
}

func parse(args []string, errs io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.SetOutput(errs)
	f.BoolVar(&o.keep, "keep", on(os.Getenv("KEEP")), "leave everything running and print commands to try (make: KEEP=1)")
	f.BoolVar(&o.clean, "clean", false, "take down what -keep or a killed demo has left")
	f.StringVar(&o.nvm, "nvm", os.Getenv("NVM"), "fast tier: a directory, or a block device with a filesystem (make: NVM=…); default: ext4 in memory")
	f.StringVar(&o.hdd, "hdd", os.Getenv("HDD"), "slow tier: likewise (make: HDD=…); default: ext4 on a file")
	f.StringVar(&o.policy, "policy", os.Getenv("POLICY"), "placement policy (make: POLICY=…); default: the daemon's")
	f.StringVar(&o.rate, "rate", or(os.Getenv("RATE"), "100Mbit"), "bandwidth of the link to the registry (make: RATE=…)")
	f.StringVar(&o.out, "out", "out", "directory of demo.json and of the image cache")
	f.BoolVar(&o.tiny, "tiny", false, "a small image of generated files in place of Debian packages")
	f.StringVar(&o.name, "name", "", "keeps several demos on one machine apart; default: from the working directory")
	f.BoolVar(&o.held, "held", false, "internal: be the process that stays with -keep")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: the demo takes flags only", f.Arg(0))
	}
	if o.policy != "" {
		if _, err := placement.ParsePolicy(o.policy); err != nil {
			return o, err
		}
	}
	if _, err := placement.ParseRate(o.rate); err != nil {
		return o, fmt.Errorf("rate of the link: %w", err)
	}
	var err error
	o.out, err = filepath.Abs(o.out)
	return o, err
}

// on reads a variable of make: 0, no and the like are not "leave it running".
func on(s string) bool {
	switch strings.ToLower(s) {
	case "", "0", "no", "n", "false", "off":
		return false
	}
	return true
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func main() {
	o, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		if !o.held {
			// A `go run` or make that is told to end dies without a word to us.
			_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0)
		}
		// SIGHUP too: a terminal that is closed must not leave mounts behind.
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		err = run(ctx, o)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", complain(o.out, err))
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("it mounts filesystems and runs containers: run it as root")
	}
	switch {
	case o.clean:
		return clean(ctx, o)
	case o.keep && !o.held:
		return holdInBackground(ctx)
	}
	return demo(ctx, o)
}

// complain makes one line of an error. What has more lines, the end of a log mostly, is kept in a file.
func complain(out string, err error) string {
	first, more, cut := strings.Cut(err.Error(), "\n")
	if !cut || strings.TrimSpace(more) == "" {
		return first
	}
	file := filepath.Join(out, "demo-error.log")
	if os.MkdirAll(out, 0o755) != nil || os.WriteFile(file, []byte(err.Error()+"\n"), 0o644) != nil {
		return strings.Join(strings.Fields(err.Error()), " ")
	}
	return fmt.Sprintf("%s (more in %s)", strings.TrimSuffix(first, ":"), file)
}
