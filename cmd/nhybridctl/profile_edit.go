// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// difference is profile.Difference in JSON.
type difference struct {
	Added   []profile.File `json:"added"`
	Removed []profile.File `json:"removed"`
	Changed []change       `json:"changed"`
	Same    int            `json:"same"`
}

type change struct {
	Old     profile.File `json:"old"`
	New     profile.File `json:"new"`
	Content bool         `json:"content"`
}

func (a *app) profileDiff() *cobra.Command {
	return &cobra.Command{
		Use: "diff A B", Short: "Compare two profiles, each of an image or a file", Args: cobra.ExactArgs(2), ValidArgsFunction: a.images,
		Long: "Compare two profiles. A name is a file if there is one (- is the standard input), else an\nimage. + is only in B, - only in A, ! has other content (size, digest or layer),\n~ was used otherwise (kind or bytes touched).",
		RunE: func(c *cobra.Command, args []string) error {
			from, err := a.load(c, args[0])
			if err != nil {
				return err
			}
			to, err := a.load(c, args[1])
			if err != nil {
				return err
			}
			d := profile.Diff(from, to)
			if a.json {
				// Never null: an empty list has no files.
				out := difference{append([]profile.File{}, d.Added...), append([]profile.File{}, d.Removed...), []change{}, d.Same}
				for _, x := range d.Changed {
					out.Changed = append(out.Changed, change(x))
				}
				return a.printJSON(out)
			}
			return a.printDiff(d)
		},
	}
}

func (a *app) printDiff(d profile.Difference) error {
	var rows [][]string
	row := func(sign string, f profile.File, what string) {
		rows = append(rows, []string{sign, string(f.Kind), a.size(f.Size), control.Printable("/" + string(f.Path)), what})
	}
	for _, f := range d.Removed {
		row("-", f, "")
	}
	for _, f := range d.Added {
		row("+", f, "")
	}
	for _, x := range d.Changed {
		sign, what := "~", []string{}
		if x.Content {
			sign = "!"
			if x.Old.Size != x.New.Size {
				what = append(what, "was "+a.size(x.Old.Size))
			} else {
				what = append(what, "other content")
			}
		}
		if x.Old.Kind != x.New.Kind {
			what = append(what, "was "+string(x.Old.Kind))
		}
		if x.Old.Touched != x.New.Touched && !x.Content {
			what = append(what, fmt.Sprintf("touched %s, was %s", a.touched(x.New), a.touched(x.Old)))
		}
		row(sign, x.New, strings.Join(what, ", "))
	}
	if len(rows) > 0 {
		if err := a.table(rows); err != nil {
			return err
		}
		fmt.Fprintln(a.out)
	}
	fmt.Fprintf(a.out, "%d removed (%s), %d added (%s), %d changed, %d the same\n", len(d.Removed), a.size(profile.Bytes(d.Removed)),
		len(d.Added), a.size(profile.Bytes(d.Added)), len(d.Changed), d.Same)
	return nil
}

func (a *app) touched(f profile.File) string {
	if f.Touched < 0 {
		return "-"
	}
	return a.size(f.Touched)
}

func (a *app) profileRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm IMAGE", Short: "Forget the profile of an image, its rules too", Args: cobra.ExactArgs(1), ValidArgsFunction: a.images,
		RunE: func(c *cobra.Command, args []string) error {
			return a.with(func(client control.Client) error {
				if _, err := client.RemoveProfile(c.Context(), &control.ImageRequest{Image: args[0], Namespace: a.namespace}); err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"image": args[0], "ok": true})
				}
				fmt.Fprintf(a.out, "removed the profile of %s\n", args[0])
				return nil
			})
		},
	}
}

func (a *app) profileRule(name string, action profile.Action, short string) *cobra.Command {
	return &cobra.Command{
		Use: name + " IMAGE GLOB", Short: short, Args: cobra.ExactArgs(2), ValidArgsFunction: a.images,
		Long: short + ".\nThe glob is held against paths from the root of the image: *, ?, [a-z], {a,b}, and ** for any number of directories. Of\nseveral rules the last that matches counts.",
		Example: map[string]string{
			"pin":     "  nhybridctl profile pin docker.io/library/postgres:17 '/usr/lib/postgresql/**'",
			"exclude": "  nhybridctl profile exclude docker.io/library/python:3 '**/*.a'",
			"unpin":   "  nhybridctl profile unpin docker.io/library/postgres:17 '/usr/lib/postgresql/**'",
		}[name],
		RunE: func(c *cobra.Command, args []string) error {
			if !utf8.ValidString(args[1]) { // rules stand in profiles, which are JSON
				return usage(fmt.Sprintf("%s: glob %s is not UTF-8; write ? for each byte that is not, such as '/n/bad?' for the file \"/n/bad\\xff\"", name, control.Printable(args[1])))
			}
			return a.with(func(client control.Client) error {
				r, err := client.SetRule(c.Context(), &control.SetRuleRequest{Image: args[0], Namespace: a.namespace, Glob: args[1], Action: string(action)})
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				fmt.Fprintf(a.out, "%s matches %d files of %s, %s\n", control.Printable(args[1]), r.GetFiles(), args[0], a.size(r.GetBytes()))
				if len(r.GetRules()) == 0 {
					fmt.Fprintln(a.out, "no rules are left")
					return nil
				}
				fmt.Fprintln(a.out)
				rows := [][]string{{"RULE", "GLOB"}}
				for _, rule := range r.GetRules() {
					rows = append(rows, []string{rule.GetAction(), control.Printable(rule.GetGlob())})
				}
				return a.table(rows)
			})
		},
	}
}

const plainHTTP = "speak HTTP without TLS"

func (a *app) profilePush() *cobra.Command {
	var plain bool
	c := &cobra.Command{
		Use: "push IMAGE", Short: "Store the profile of an image beside it in its registry", Args: cobra.ExactArgs(1), ValidArgsFunction: a.images,
		Long: "Store the profile of an image in the registry, as an OCI artifact that refers to the image. Rules stay on this node.\nThe daemon pushes, with the credentials of its user's docker configuration.",
		RunE: func(c *cobra.Command, args []string) error {
			return a.with(func(client control.Client) error {
				r, err := client.PushProfile(c.Context(), &control.RegistryRequest{Image: args[0], Namespace: a.namespace, PlainHttp: plain})
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				fmt.Fprintf(a.out, "pushed the profile of %s: %d files, %s; %s\n", args[0], r.GetProfile().GetFiles(), a.size(r.GetProfile().GetHotBytes()), r.GetDigest())
				return nil
			})
		},
	}
	c.Flags().BoolVar(&plain, "plain-http", false, plainHTTP)
	return c
}

func (a *app) profilePull() *cobra.Command {
	var plain bool
	c := &cobra.Command{
		Use: "pull IMAGE", Short: "Fetch the profile of an image from its registry", Args: cobra.ExactArgs(1), ValidArgsFunction: a.images,
		Long: "Fetch the profile of an image from its registry, in place of the one that is here. It is held against the image, as with\nprofile import.",
		RunE: func(c *cobra.Command, args []string) error {
			return a.with(func(client control.Client) error {
				r, err := client.PullProfile(c.Context(), &control.RegistryRequest{Image: args[0], Namespace: a.namespace, PlainHttp: plain})
				if err != nil {
					return err
				}
				return a.printPut("pulled", r)
			})
		},
	}
	c.Flags().BoolVar(&plain, "plain-http", false, plainHTTP)
	return c
}

func (a *app) profileReady() *cobra.Command {
	return &cobra.Command{
		Use: "ready CONTAINER", Short: "Say that a container has started: what it opens from now on is not part of its start", Args: cobra.ExactArgs(1),
		Long: "End the watch of a start. Without this it ends when for some seconds no file is opened for the first time, or after\na minute. Call it from a readiness check, for example.",
		RunE: func(c *cobra.Command, args []string) error {
			return a.with(func(client control.Client) error {
				r, err := client.Ready(c.Context(), &control.ReadyRequest{Container: args[0], Namespace: a.namespace})
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				s := r.GetStart()
				fmt.Fprintf(a.out, "the start of %s (%s) is over: %d files, since %s\n", s.GetContainer(), orDash(s.GetImage()), s.GetFiles(), s.GetSince().AsTime().Format(time.RFC3339))
				return nil
			})
		},
	}
}
