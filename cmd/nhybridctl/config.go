// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) config() *cobra.Command {
	c := &cobra.Command{
		Use: "config", Short: "Print or check a configuration", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return usage("config: say default, dump or check") },
	}
	c.AddCommand(
		&cobra.Command{
			Use: "default", Short: "Print every key with its meaning and its default", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error {
				b, err := config.Default().Marshal()
				if err != nil {
					return err
				}
				return a.printTOML(b)
			},
		},
		&cobra.Command{
			Use: "dump", Short: "Print the configuration that the daemon runs with", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				return a.with(func(client control.Client) error {
					r, err := client.Config(c.Context(), &control.ConfigRequest{})
					if err != nil {
						return err
					}
					return a.printTOML([]byte(r.GetToml()))
				})
			},
		},
		&cobra.Command{
			Use: "check [FILE]", Short: "Check a configuration file; - reads the standard input", Args: cobra.MaximumNArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				file := config.DefaultFile
				if len(args) == 1 {
					file = args[0]
				}
				var data []byte
				var err error
				if file == "-" {
					file = "standard input"
					data, err = io.ReadAll(c.InOrStdin())
				} else {
					data, err = os.ReadFile(file)
				}
				if err != nil {
					return fmt.Errorf("read configuration: %w", err)
				}
				if _, err := config.Parse(file, data); err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"file": file, "ok": true})
				}
				fmt.Fprintf(a.out, "%s: ok\n", file)
				return nil
			},
		})
	return c
}

func (a *app) printTOML(b []byte) error {
	if !a.json {
		_, err := a.out.Write(b)
		return err
	}
	var v map[string]any
	if err := toml.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	return a.printJSON(v)
}
