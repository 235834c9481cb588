// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Bench measures nhybrid on emulated devices and renders what was measured. Each benchmark is a subcommand in a package
// of its own and writes a [result.Result] to NAME.json. docs/bench.md says how to read them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/deploy"
	"github.com/nhybrid/nhybrid/integration/bench/hif"
	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/bench/scm"
)

func main() {
	root := &cobra.Command{
		Use: "bench", Short: "Measure nhybrid against containerd's overlayfs snapshotter",
		SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(deploy.Command(), hif.Command(), scm.Command(), report())
	// What is mounted and running is taken down on these; a second signal ends the program at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func report() *cobra.Command {
	return &cobra.Command{
		Use: "report FILE.json...", Short: "Render results as Markdown", Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, files []string) error {
			for _, file := range files {
				r, err := result.Read(file)
				if err != nil {
					return err
				}
				if err := r.Markdown(c.OutOrStdout()); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
