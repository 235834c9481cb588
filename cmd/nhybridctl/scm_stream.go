// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) scmExport() *cobra.Command {
	return &cobra.Command{
		Use: "export REGION [FILE]", Short: "Write a region to a file, or to the standard output", Args: cobra.RangeArgs(1, 2), ValidArgsFunction: a.regionNames,
		Long: "Write what a region holds now, with checksums, to a file that is not there yet, or to the standard output. Its container stands\nstill while the region is copied, not while the copy is written.",
		RunE: func(c *cobra.Command, args []string) error {
			q := region.Args{Namespace: a.within(), Region: args[0]}
			if len(args) == 1 || args[1] == "-" {
				if a.json {
					return usage("scm export: --json and the stream cannot both go to the standard output; name a file")
				}
				if _, _, ok := terminal(a.out); ok {
					return usage("scm export: the standard output is a terminal; name a file, or send it elsewhere")
				}
				_, err := a.export(c.Context(), q, a.out)
				return err
			}
			f, err := os.OpenFile(args[1], os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return fmt.Errorf("export region: %w", err)
			}
			stats, err := a.export(c.Context(), q, f)
			if err == nil {
				err = f.Sync()
			}
			if err = errors.Join(err, f.Close()); err != nil {
				return errors.Join(err, os.Remove(args[1])) // half of a stream is of no use
			}
			if a.json {
				return a.printJSON(stats)
			}
			fmt.Fprintf(a.out, "%s: %s in use, %s\n", control.Printable(args[1]), a.size(stats.Used), a.size(stats.Stream))
			return nil
		},
	}
}

// export writes the stream of a region.
func (a *app) export(ctx context.Context, q region.Args, to io.Writer) (stats stream.Stats, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return stats, err
	}
	done := make(chan error, 1)
	go func() {
		_, err := a.ask(ctx, region.OpExport, q, &stats, w)
		if ctx.Err() != nil {
			_ = r.Close() // nobody wants more of it
		}
		done <- err
	}()
	_, copyErr := io.Copy(to, r)
	_ = r.Close() // twice, perhaps
	err = <-done
	if copyErr != nil && ctx.Err() == nil { // what the daemon says then follows from it
		return stats, fmt.Errorf("write region: %w", copyErr)
	}
	return stats, err
}

func (a *app) scmImport() *cobra.Command {
	return &cobra.Command{
		Use: "import NAME [FILE]", Short: "Make a volume of what export wrote, from a file or the standard input", Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			from := c.InOrStdin()
			if len(args) == 2 && args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return fmt.Errorf("import region: %w", err)
				}
				defer f.Close()
				from = f
			}
			rec, err := a.feed(c.Context(), region.Args{Namespace: a.within(), Region: args[0]}, from)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(rec)
			}
			_, err = fmt.Fprintln(a.out, made(rec))
			return err
		},
	}
}

// feed reads the stream of a region.
func (a *app) feed(ctx context.Context, q region.Args, from io.Reader) (rec region.Record, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return rec, err
	}
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, from)
		copied <- err // first, so that it is known when the daemon complains of the end
		_ = w.Close() // of a pipe
	}()
	_, err = a.ask(ctx, region.OpImport, q, &rec, r) // and closes it, so that the writer ends, whatever is left
	if ctx.Err() != nil {                            // the input may be one that waits for ever
		return rec, err
	}
	select {
	case copyErr := <-copied:
		if copyErr != nil && !errors.Is(copyErr, unix.EPIPE) {
			return rec, fmt.Errorf("read region: %w", copyErr)
		}
	default: // the daemon has enough, or will not have it; what comes still is not waited for
	}
	return rec, err
}
