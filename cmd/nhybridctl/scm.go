// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/scmlib/region/ctrd"
	"github.com/nhybrid/nhybrid/scmlib/region/registry"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// scm has the commands for regions. They go to a socket of their own, which the configuration of the daemon names.
func (a *app) scm() *cobra.Command {
	c := &cobra.Command{
		Use: "scm", Short: "Show and steer regions, the persistent memory of containers", Args: cobra.NoArgs,
		Long: "Show and steer regions, the persistent memory of containers. REGION is the NAME of a volume, container/ID or\nsnapshot/NAME, in the namespace of -n (\"default\" where none is given; ls and df show all then).\nSIZE is bytes, or a number with k, m, g or t, of powers of 1024.",
		RunE: func(*cobra.Command, []string) error {
			return usage("scm: say create, ls, inspect, df, resize, snapshot, clone, export, import, rm, keep, check, attach, push, pull or commit")
		},
	}
	c.PersistentFlags().StringVar(&a.regions, "scm-address", os.Getenv("NHYBRID_SCM_ADDRESS"), "socket of regions (default: the daemon is asked)")
	c.AddCommand(a.scmCreate(), a.scmList(), a.scmInspect(), a.scmSpace(), a.scmResize(), a.scmCopy("snapshot"), a.scmCopy("clone"), a.scmExport(), a.scmImport(),
		a.scmRemove(), a.scmKeep(), a.scmCheck(), a.scmAttach(), a.scmPush(), a.scmPull(), a.scmCommit())
	return c
}

var errOff = errors.New("the daemon gives no regions: set scm.enabled = true in its configuration")

// regionSocket finds the socket of regions.
func (a *app) regionSocket(ctx context.Context) (string, error) {
	if a.regions != "" {
		if !filepath.IsAbs(a.regions) {
			return "", usage(fmt.Sprintf("--scm-address %q is not the absolute path of a socket", a.regions))
		}
		return a.regions, nil
	}
	var c config.Config
	err := a.with(func(client control.Client) error {
		r, err := client.Config(ctx, &control.ConfigRequest{})
		if err != nil {
			return err
		}
		if c, err = config.Parse("the daemon's configuration", []byte(r.GetToml())); err != nil {
			return fmt.Errorf("%w; use the nhybridctl that came with the daemon", err)
		}
		return nil
	})
	switch {
	case err != nil:
		return "", err
	case !c.SCM.Enabled:
		return "", errOff
	case c.SCM.Address == "":
		return "", errors.New("the daemon is older than nhybridctl and knows no regions")
	}
	return c.SCM.Address, nil
}

// ask does one operation, which the daemon ends when this process does. files are closed once it is over, or on its way to be.
func (a *app) ask(ctx context.Context, op string, args, result any, files ...*os.File) ([]*os.File, error) {
	socket, err := a.regionSocket(ctx)
	if err != nil {
		api.CloseAll(files)
		return nil, err
	}
	type answer struct {
		result json.RawMessage // not result itself, which is the caller's again once this returns
		files  []*os.File
		err    error
	}
	done := make(chan answer, 1)
	go func() {
		var got answer
		got.files, got.err = api.Call(socket, op, args, &got.result, files...)
		api.CloseAll(files) // not before: nobody else may get their numbers
		done <- got
	}()
	select {
	case got := <-done:
		if got.err == nil && result != nil {
			if err := json.Unmarshal(got.result, result); err != nil {
				api.CloseAll(got.files)
				return nil, fmt.Errorf("answer of the daemon: %w; use the nhybridctl that came with it", err)
			}
		}
		return got.files, region.ErrorOf(got.err)
	case <-ctx.Done(): // the connection ends with the process, and with it what was asked for
		return nil, fmt.Errorf("%s was interrupted", op)
	}
}

// within is the namespace of what has to be in one.
func (a *app) within() string { return cmp.Or(a.namespace, "default") }

// regionCall is a command that does one operation and says what there is then.
func regionCall[A, R any](a *app, c *cobra.Command, op string, args func([]string) (A, error), say func(R) string) *cobra.Command {
	c.RunE = func(c *cobra.Command, given []string) error {
		q, err := args(given)
		if err != nil {
			return usage(fmt.Sprintf("scm %s: %s", c.Name(), control.ErrorMessage(err)))
		}
		var r R
		if _, err := a.ask(c.Context(), op, q, &r); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(r)
		}
		_, err = fmt.Fprintln(a.out, say(r))
		return err
	}
	return c
}

func (a *app) scmCreate() *cobra.Command {
	var size string
	var o region.CreateOptions
	c := regionCall(a, &cobra.Command{Use: "create NAME --size SIZE", Short: "Make a volume of zeros", Args: cobra.ExactArgs(1)}, region.OpCreate,
		func(args []string) (q region.Args, err error) {
			if size == "" {
				return q, errors.New("say --size")
			}
			o.Size, err = region.ParseSize(size)
			return region.Args{Namespace: a.within(), Region: args[0], Create: o}, err
		}, made)
	c.Flags().StringVar(&size, "size", "", "its size, for ever, or until it is resized")
	c.Flags().BoolVar(&o.Shared, "shared", false, "several containers may have it at a time; the lock of scmlib decides who writes")
	return c
}

func made(r region.Record) string {
	return fmt.Sprintf("%s %s of %s in namespace %s", r.Kind, r.Name, region.FormatSize(r.Size), r.Namespace)
}

func (a *app) scmResize() *cobra.Command {
	return regionCall(a, &cobra.Command{Use: "resize REGION SIZE", Short: "Make a region larger that nobody has", Args: cobra.ExactArgs(2), ValidArgsFunction: a.regionNames}, region.OpResize,
		func(args []string) (region.Args, error) {
			n, err := region.ParseSize(args[1])
			return region.Args{Namespace: a.within(), Region: args[0], Create: region.CreateOptions{Size: n}}, err
		}, made)
}

func (a *app) scmCopy(op string) *cobra.Command {
	c := &cobra.Command{Use: op + " REGION NAME", Args: cobra.ExactArgs(2), ValidArgsFunction: a.regionNames}
	var size string
	var o region.CreateOptions
	if op == region.OpSnapshot {
		c.Short = "Keep what a region holds now; its container stands still meanwhile"
	} else {
		c.Short = "Make a volume with the content of a region, volume or snapshot"
		c.Flags().StringVar(&size, "size", "", "more than the region has")
		c.Flags().BoolVar(&o.Shared, "shared", false, "several containers may have it at a time")
	}
	return regionCall(a, c, op, func(args []string) (q region.Args, err error) {
		if size != "" {
			o.Size, err = region.ParseSize(size)
		}
		return region.Args{Namespace: a.within(), Region: args[0], To: args[1], Create: o}, err
	}, made)
}

func (a *app) scmRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm REGION...", Short: "Remove regions that nobody has", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.regionNames,
		RunE: func(c *cobra.Command, args []string) error {
			for _, name := range args {
				if _, err := a.ask(c.Context(), region.OpRemove, region.Args{Namespace: a.within(), Region: name}, nil); err != nil {
					return err
				}
				if !a.json {
					fmt.Fprintln(a.out, "removed", name)
				}
			}
			if a.json {
				return a.printJSON(map[string]any{"removed": args})
			}
			return nil
		},
	}
}

func (a *app) scmKeep() *cobra.Command {
	var off bool
	c := &cobra.Command{
		Use: "keep CONTAINER", Short: "Let the region of a container become a volume when the container is removed", Args: cobra.ExactArgs(1), ValidArgsFunction: a.regionNames,
		RunE: func(c *cobra.Command, args []string) error {
			id := strings.TrimPrefix(args[0], "container/")
			q := region.Args{Namespace: a.within(), Region: "container/" + id, Keep: !off}
			if _, err := a.ask(c.Context(), region.OpKeep, q, nil); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"container": id, "keep": !off})
			}
			fate := "becomes volume " + id
			if off {
				fate = "goes with it, unless scm.keep says otherwise"
			}
			fmt.Fprintf(a.out, "when container %s is removed its region %s\n", id, fate)
			return nil
		},
	}
	c.Flags().BoolVar(&off, "off", false, "let it go with its container again")
	return c
}

func (a *app) scmPush() *cobra.Command {
	var plainHTTP bool
	c := regionCall(a, &cobra.Command{Use: "push REGION REFERENCE", Short: "Store a region in a registry, as an artifact", Args: cobra.ExactArgs(2), ValidArgsFunction: a.regionNames}, registry.OpPush,
		func(args []string) (registry.Args, error) {
			return registry.Args{Namespace: a.within(), Region: args[0], Ref: args[1], PlainHTTP: plainHTTP}, nil
		}, func(r registry.Pushed) string {
			return fmt.Sprintf("%s: %s in use, %s sent", r.Ref, a.size(r.Used), a.size(r.Sent))
		})
	c.Flags().BoolVar(&plainHTTP, "plain-http", false, "the registry has no TLS")
	return c
}

func (a *app) scmPull() *cobra.Command {
	var plainHTTP bool
	c := regionCall(a, &cobra.Command{Use: "pull REFERENCE NAME", Short: "Make a volume of a region in a registry", Args: cobra.ExactArgs(2)}, registry.OpPull,
		func(args []string) (registry.Args, error) {
			return registry.Args{Namespace: a.within(), Ref: args[0], Region: args[1], PlainHTTP: plainHTTP}, nil
		}, made)
	c.Flags().BoolVar(&plainHTTP, "plain-http", false, "the registry has no TLS")
	return c
}

func (a *app) scmCommit() *cobra.Command {
	var only bool
	c := regionCall(a, &cobra.Command{
		Use: "commit CONTAINER IMAGE", Short: "Make an image of a container and its region, as both are now", Args: cobra.ExactArgs(2),
		Long: "Make an image of a container: the layers it was started from, what it has changed of them, and its region, both as\nthey are at one instant, for which it stands still. A container that is started from the image with a region has this one.",
	}, ctrd.OpCommit, func(args []string) (ctrd.CommitArgs, error) {
		return ctrd.CommitArgs{Namespace: a.within(), Container: args[0], Ref: args[1], OnlyScm: only}, nil
	}, func(r ctrd.Committed) string {
		return fmt.Sprintf("%s@%s: region of %s, %s in use; the container stood still for %s", r.Image, r.Digest, region.FormatSize(r.Size), a.size(r.Used), r.Stood.Round(100*time.Microsecond))
	})
	c.Flags().BoolVar(&only, "only-region", false, "leave out what the container has changed of its root filesystem")
	return c
}

// regionNames completes them, if the daemon answers at once.
func (a *app) regionNames(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 && c.Name() != "rm" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), time.Second)
	defer cancel()
	var l region.Listing
	var names []string
	if _, err := a.ask(ctx, region.OpList, region.Args{Namespace: a.within()}, &l); err == nil {
		for _, r := range l.Regions {
			names = append(names, r.String())
		}
	}
	return sorted(names), cobra.ShellCompDirectiveNoFileComp
}
