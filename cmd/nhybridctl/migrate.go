// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) migrate() *cobra.Command {
	c := &cobra.Command{
		Use: "migrate", Short: "Show and steer the moving of files between the tiers", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return usage("migrate: say status, pause, resume or now") },
	}
	call := func(use, short string, f func(control.Client) func(context.Context, *control.MigrationRequest, ...grpc.CallOption) (*control.MigrationState, error)) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				return a.with(func(client control.Client) error {
					m, err := f(client)(c.Context(), &control.MigrationRequest{})
					if err != nil {
						return err
					}
					return a.printMigration(m)
				})
			},
		}
	}
	type method = func(context.Context, *control.MigrationRequest, ...grpc.CallOption) (*control.MigrationState, error)
	c.AddCommand(
		call("status", "Show what moves, what is left, and why nothing moves", func(c control.Client) method { return c.Migration }),
		call("pause", "Move nothing until migrate resume", func(c control.Client) method { return c.PauseMigration }),
		call("resume", "Go on after migrate pause", func(c control.Client) method { return c.ResumeMigration }),
		a.migrateNow())
	return c
}

// pollInterval is how often migrate now --wait looks.
const pollInterval = 250 * time.Millisecond

func (a *app) migrateNow() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "now", Short: "Move what is due without limits", Args: cobra.NoArgs,
		Long: "Move what is due without limits of rate and without waiting for quiet, once. With --wait it returns when all is done;\nthe exit code is 1 if files could not be moved.",
		RunE: func(c *cobra.Command, _ []string) error {
			return a.with(func(client control.Client) error {
				before, err := client.Migration(c.Context(), &control.MigrationRequest{})
				if err != nil {
					return err
				}
				m, err := client.MigrateNow(c.Context(), &control.MigrationRequest{})
				if err != nil {
					return err
				}
				if wait {
					if m, err = a.waitMigration(c.Context(), client, m); err != nil {
						return err
					}
				}
				if err := a.printMigration(m); err != nil {
					return err
				}
				// What failed at first and was done then is not named any more.
				if n := m.GetFailed() - before.GetFailed(); wait && n > 0 && m.GetLastError() != "" {
					return fmt.Errorf("%d files could not be moved; the last: %s", n, m.GetLastError())
				}
				return nil
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until all is done")
	return c
}

// waitMigration shows progress, on a terminal, until nothing is left to do.
func (a *app) waitMigration(ctx context.Context, client control.Client, m *control.MigrationState) (*control.MigrationState, error) {
	show := func(*control.MigrationState) {}
	if _, _, ok := terminal(a.errs); ok {
		started := done(m)
		bar := progressbar.NewOptions64(1, progressbar.OptionSetWriter(a.errs), progressbar.OptionShowBytes(true), progressbar.OptionClearOnFinish())
		defer bar.Finish() //nolint:errcheck // an ornament
		show = func(m *control.MigrationState) {
			moved := done(m) - started
			bar.ChangeMax64(max(1, moved+left(m)))
			bar.Describe(m.GetState())
			_ = bar.Set64(moved) // an ornament
		}
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		show(m)
		switch m.GetState() {
		case "idle":
			return m, nil
		case "paused":
			return nil, errors.New("somebody paused the migration: go on with nhybridctl migrate resume")
		}
		var err error
		select {
		case <-tick.C:
			m, err = client.Migration(ctx, &control.MigrationRequest{})
		case <-ctx.Done():
			err = ctx.Err()
		}
		if ctx.Err() != nil {
			return nil, errors.New("not waiting any longer; the migration goes on")
		}
		if err != nil {
			return nil, err
		}
	}
}

func done(m *control.MigrationState) (n int64) {
	for _, d := range m.GetDirections() {
		n += d.GetBytesDone()
	}
	return n
}

func left(m *control.MigrationState) (n int64) {
	for _, d := range m.GetDirections() {
		n += d.GetBytesLeft()
	}
	return n
}

func (a *app) printMigration(m *control.MigrationState) error {
	if a.json {
		return a.printMessage(m)
	}
	state := m.GetState()
	if m.GetNow() {
		state += ", without limits"
	}
	if m.GetWhy() != "" {
		state += ": " + control.Message(m.GetWhy())
	}
	rows := [][]string{{"state", state}}
	if len(m.GetCurrent()) > 0 {
		rows = append(rows, []string{"moving", moving(string(m.GetCurrent()), m.GetCurrentDirection())})
	}
	var limits []string
	if m.GetRateLimit() > 0 {
		limits = append(limits, placement.FormatRate(m.GetRateLimit()))
	}
	if m.GetOperationsLimit() > 0 {
		limits = append(limits, fmt.Sprintf("%.0f operations/s", m.GetOperationsLimit()))
	}
	if len(limits) > 0 {
		rows = append(rows, []string{"limits", strings.Join(limits, ", ")})
	}
	if m.GetNvmTotal() > 0 {
		nvm := fmt.Sprintf("%s of %s used%s", a.size(m.GetNvmUsed()), a.size(m.GetNvmTotal()), percent(m.GetNvmUsed(), m.GetNvmTotal()))
		if m.GetHigh() > 0 {
			nvm += fmt.Sprintf("; files leave from %s until %s, reserve %s", a.size(m.GetHigh()), a.size(m.GetLow()), a.size(m.GetReserve()))
		}
		rows = append(rows, []string{"nvm", nvm})
	}
	if inodesScarcer(m) {
		rows = append(rows, []string{"inodes", fmt.Sprintf("%d of %d used%s; files leave from %d until %d, reserve %d",
			m.GetInodesUsed(), m.GetInodes(), percent(m.GetInodesUsed(), m.GetInodes()), m.GetInodesHigh(), m.GetInodesLow(), m.GetInodesReserve())})
	}
	rows = append(rows,
		[]string{"pinned", a.size(m.GetPinnedBytes()) + ": unlinked, still open"},
		[]string{"settled", fmt.Sprintf("%d of %d layers", m.GetSettled(), m.GetLayers())})
	if m.GetFailed() > 0 {
		failed := fmt.Sprintf("%d times since the daemon started", m.GetFailed())
		if m.GetLastError() != "" {
			failed += fmt.Sprintf("; not made good yet, and tried again, of %s: %s", m.GetLastErrorTime().AsTime().Format(time.RFC3339), control.Message(m.GetLastError()))
		}
		rows = append(rows, []string{"failed", failed})
	}
	if err := a.table(rows); err != nil || len(m.GetDirections()) == 0 {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"DIRECTION", "FILES DONE", "DONE", "FILES LEFT", "LEFT"}}
	for _, d := range m.GetDirections() {
		rows = append(rows, []string{
			d.GetName(), strconv.FormatInt(d.GetFilesDone(), 10), a.size(d.GetBytesDone()), strconv.FormatInt(d.GetFilesLeft(), 10), a.size(d.GetBytesLeft()),
		})
	}
	return a.table(rows)
}

// inodesScarcer reports whether NVM has a larger share of its inodes in use than of its bytes: files then leave for inodes.
func inodesScarcer(m *control.MigrationState) bool {
	return m.GetInodes() > 0 && m.GetNvmTotal() > 0 &&
		float64(m.GetInodesUsed())/float64(m.GetInodes()) > float64(m.GetNvmUsed())/float64(m.GetNvmTotal())
}

// numbered is a data file by the numbers of the layer and of the file in it, as docs/store.md has it.
var numbered = regexp.MustCompile(`^/?([0-9]+)/[0-9a-f]{2}/([0-9]+)$`)

// moving says what is being moved, and where to. The daemon names a file by its numbers, and a layer whose pack is filled by
// its number.
func moving(current, direction string) string {
	what := control.Printable(current)
	if _, err := strconv.ParseUint(current, 10, 64); err == nil {
		what = "layer " + current
	} else if n := numbered.FindStringSubmatch(current); n != nil {
		what = fmt.Sprintf("file %s of layer %s", n[2], n[1])
	}
	return fmt.Sprintf("%s (%s)", what, direction)
}

// percent is a share in words, or nothing where there is no whole.
func percent(n, of int64) string {
	if of <= 0 {
		return ""
	}
	return fmt.Sprintf(" (%.1f %%)", 100*float64(n)/float64(of))
}
