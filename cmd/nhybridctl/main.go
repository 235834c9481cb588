// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// nhybridctl shows what stands on which tier, and why, steers what of images is kept on NVM, and finds what is wrong
// with an installation.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// Exit codes.
const (
	exitFailure = 1
	exitUsage   = 2
)

// version is set by the linker; without it the module's own says what was built.
var version = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// app is what the commands share.
type app struct {
	out, errs io.Writer
	address   string
	regions   string // socket, where the user names one
	namespace string
	json      bool
	bytes     bool
	// started tells a wrong command line from a command that failed: cobra runs the hook that sets it once the command,
	// its flags and the number of its arguments are right.
	started bool
}

// silent is a failure that was told already.
type silent struct{}

func (silent) Error() string { return "failed" }

// usage is a command line that is wrong in a way that only the command sees.
type usage string

func (u usage) Error() string { return string(u) }

func run(ctx context.Context, args []string, out, errs io.Writer) int {
	a := &app{out: out, errs: errs}
	root := a.root()
	root.SetArgs(append([]string{}, args...)) // nil would mean os.Args
	root.SetOut(out)
	root.SetErr(errs)
	c, err := root.ExecuteContextC(ctx)
	var wrong usage
	switch {
	case err == nil:
		return 0
	case errors.Is(err, silent{}):
		return exitFailure
	case !a.started, errors.As(err, &wrong):
		fmt.Fprintf(errs, "nhybridctl: %s; see %s --help\n", control.ErrorMessage(err), c.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(errs, "nhybridctl: %s\n", control.ErrorMessage(err))
	return exitFailure
}

func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use:               "nhybridctl",
		Short:             "Show and steer what nhybrid keeps on which tier, and why",
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRun:  func(*cobra.Command, []string) { a.started = true },
		RunE:              func(*cobra.Command, []string) error { return usage("no command is given") },
		Args:              cobra.NoArgs,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: false},
	}
	f := c.PersistentFlags()
	address := config.DefaultControlAddress
	if v := os.Getenv("NHYBRID_CONTROL_ADDRESS"); v != "" {
		address = v
	}
	f.StringVarP(&a.address, "address", "a", address, "control socket of the daemon")
	f.StringVarP(&a.namespace, "namespace", "n", os.Getenv("CONTAINERD_NAMESPACE"), "containerd namespace")
	f.BoolVar(&a.json, "json", false, "print JSON")
	f.BoolVar(&a.bytes, "bytes", false, "print sizes as bytes")
	c.AddCommand(a.status(), a.ls(), a.inspect(), a.why(), a.du(), a.watch(), a.top(), a.profile(), a.migrate(), a.scm(), a.doctor(), a.simulate(), a.config(), a.version())
	return c
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of nhybridctl", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v, revision := buildVersion()
			if a.json {
				return a.printJSON(map[string]string{"version": v, "revision": revision})
			}
			fmt.Fprintln(a.out, strings.TrimSpace("nhybridctl "+v+" "+revision))
			return nil
		},
	}
}

func buildVersion() (v, revision string) {
	v = version
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v, ""
	}
	if v == "" {
		v = info.Main.Version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return v, revision
}
