// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) profile() *cobra.Command {
	c := &cobra.Command{
		Use: "profile", Short: "Show, edit and exchange what starts of images need", Args: cobra.NoArgs,
		Long: "A profile is what the starts of an image have opened: these files are kept on NVM. An image is named by its reference\nor by the digest of its manifest.",
		RunE: func(*cobra.Command, []string) error {
			return usage("profile: say ls, show, export, import, diff, rm, pin, unpin, exclude, push, pull or ready")
		},
	}
	c.AddCommand(a.profileLs(), a.profileShow(), a.profileExport(), a.profileImport(), a.profileDiff(), a.profileRm(),
		a.profileRule("pin", profile.Pin, "Keep files on NVM, whether starts use them or not"),
		a.profileRule("exclude", profile.Exclude, "Never keep files on NVM"),
		a.profileRule("unpin", profile.Normal, "Take back a pin or an exclude, or make an exception to others"),
		a.profilePush(), a.profilePull(), a.profileReady())
	return c
}

func (a *app) profileLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the images of which something is known", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var all []*control.ProfileInfo
			err := a.with(func(client control.Client) error {
				stream, err := client.Profiles(c.Context(), &control.ProfilesRequest{Namespace: a.namespace})
				if err != nil {
					return err
				}
				return receive(c.Context(), stream, func(p *control.ProfileInfo) error { all = append(all, p); return nil })
			})
			if err != nil {
				return err
			}
			if a.json {
				return printList(a, all)
			}
			rows := [][]string{{"IMAGE", "DIGEST", "KNOWN", "STARTS", "FILES", "HOT", "RULES", "UPDATED"}}
			for _, p := range all {
				rows = append(rows, []string{
					imageName(p), control.Short(p.GetDigest()), p.GetKnown(), starts(p), strconv.FormatInt(p.GetFiles(), 10),
					a.size(p.GetHotBytes()), strconv.FormatInt(p.GetRules(), 10), updated(p),
				})
			}
			return a.table(rows)
		},
	}
}

func imageName(p *control.ProfileInfo) string {
	switch {
	case len(p.GetImages()) > 0:
		return p.GetImages()[0]
	case p.GetRepository() != "":
		return p.GetRepository() + " (gone)"
	}
	return "(gone)"
}

func starts(p *control.ProfileInfo) string {
	s := strconv.FormatInt(p.GetStarts(), 10)
	if n := p.GetIncomplete(); n > 0 {
		s += fmt.Sprintf(" + %d incomplete", n)
	}
	return s
}

func updated(p *control.ProfileInfo) string {
	if p.GetUpdated() == nil {
		return "-"
	}
	return p.GetUpdated().AsTime().Format(time.RFC3339)
}

// getProfile fetches the profile of an image, and its JSON as the daemon wrote it.
func (a *app) getProfile(ctx context.Context, image string) (info *control.ProfileInfo, data []byte, err error) {
	err = a.with(func(client control.Client) error {
		stream, err := client.GetProfile(ctx, &control.ImageRequest{Image: image, Namespace: a.namespace})
		if err != nil {
			return err
		}
		for { // not receive: half a profile is none
			switch part, err := stream.Recv(); {
			case errors.Is(err, io.EOF):
				return nil
			case err != nil:
				return err
			default:
				if part.GetInfo() != nil {
					info = part.GetInfo()
				}
				data = append(data, part.GetData()...)
			}
		}
	})
	return info, data, err
}

func (a *app) profileShow() *cobra.Command {
	return &cobra.Command{
		Use: "show IMAGE", Short: "Show the files that starts of an image need, in the order of first use", Args: cobra.ExactArgs(1),
		ValidArgsFunction: a.images,
		RunE: func(c *cobra.Command, args []string) error {
			info, data, err := a.getProfile(c.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				b, err := control.JSON(info)
				if err != nil {
					return err
				}
				return a.printJSON(map[string]json.RawMessage{"info": b, "profile": data})
			}
			p, err := profile.Decode(bytes.NewReader(data))
			if err != nil {
				return err
			}
			return a.printProfile(info, p)
		},
	}
}

func (a *app) printProfile(info *control.ProfileInfo, p profile.Profile) error {
	rows := [][]string{
		{"image", imageName(info)},
		{"digest", p.Image.String()},
		{"known", info.GetKnown()},
		{"starts", starts(info)},
		{"files", fmt.Sprintf("%d, %s", len(p.Files), a.size(profile.Bytes(p.Files)))},
		{"updated", updated(info)},
	}
	if p.Inherited != "" {
		rows = append(rows, []string{"inherited", p.Inherited.String()})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"ORDER", "KIND", "SIZE", "TOUCHED", "STARTS", "WEIGHT", "LAYER", "RULE", "PATH"}}
	for i, f := range p.Files {
		touched, rule := "-", "-"
		if f.Touched >= 0 {
			touched = a.size(f.Touched)
		}
		switch p.Action(f.Path) {
		case profile.Pin:
			rule = "pinned"
		case profile.Exclude:
			rule = "excluded"
		case profile.Normal:
		}
		rows = append(rows, []string{
			strconv.Itoa(i + 1), string(f.Kind), a.size(f.Size), touched, strconv.Itoa(f.Starts), fmt.Sprintf("%.2f", f.Weight),
			strconv.Itoa(f.Layer), rule, control.Printable("/" + string(f.Path)),
		})
	}
	if err := a.table(rows); err != nil || len(p.Rules) == 0 {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"RULE", "GLOB"}}
	for _, r := range p.Rules {
		rows = append(rows, []string{string(r.Action), control.Printable(r.Glob)})
	}
	return a.table(rows)
}

func (a *app) profileExport() *cobra.Command {
	return &cobra.Command{
		Use: "export IMAGE", Short: "Write the profile of an image as JSON", Args: cobra.ExactArgs(1), ValidArgsFunction: a.images,
		Example: "  nhybridctl profile export docker.io/library/python:3 > python.json",
		RunE: func(c *cobra.Command, args []string) error {
			_, data, err := a.getProfile(c.Context(), args[0])
			if err != nil {
				return err
			}
			_, err = a.out.Write(data)
			return err
		},
	}
}

func (a *app) profileImport() *cobra.Command {
	var image string
	c := &cobra.Command{
		Use: "import FILE", Short: "Store a profile from a file; - reads the standard input", Args: cobra.ExactArgs(1),
		Long: "Store a profile that profile export wrote. It is held against the image: a profile of another image is refused, files\nthat the image does not have so are left out and named. Rules for the image that are there already stay.",
		RunE: func(c *cobra.Command, args []string) error {
			in := c.InOrStdin()
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("read profile: %w", err)
				}
				defer f.Close()
				in = f
			}
			return a.with(func(client control.Client) error {
				r, err := a.putProfile(c.Context(), client, image, in)
				if err != nil {
					return err
				}
				return a.printPut("imported", r)
			})
		},
	}
	c.Flags().StringVar(&image, "image", "", "the image that the profile must be of (default the one that it says)")
	_ = c.RegisterFlagCompletionFunc("image", a.images) // fails for unknown flags only
	return c
}

func (a *app) putProfile(ctx context.Context, client control.Client, image string, in io.Reader) (*control.PutResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream where the file could not be read
	stream, err := client.PutProfile(ctx)
	if err != nil {
		return nil, err
	}
	part := &control.PutPart{Image: &control.ImageRequest{Image: image, Namespace: a.namespace}}
	for {
		// io.EOF: the daemon has heard enough, and its answer says why.
		if err := stream.Send(part); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		buf := make([]byte, 1<<20) // what was sent may still be in use
		n, err := io.ReadFull(in, buf)
		if n == 0 && errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("read profile: %w", err)
		}
		part = &control.PutPart{Data: buf[:n]}
	}
	return stream.CloseAndRecv()
}

// printPut tells what became of a profile from outside.
func (a *app) printPut(done string, r *control.PutResponse) error {
	if a.json {
		return a.printMessage(r)
	}
	p := r.GetProfile()
	from := ""
	if r.GetDigest() != "" {
		from = " from " + r.GetDigest()
	}
	fmt.Fprintf(a.out, "%s the profile of %s (%s)%s: %d files, %s\n", done, imageName(p), control.Short(p.GetDigest()), from, p.GetFiles(), a.size(p.GetHotBytes()))
	left := r.GetLeftOut()
	if left.GetTotal() == 0 {
		return nil
	}
	fmt.Fprintf(a.out, "%d files are left out:\n", left.GetTotal())
	for _, f := range left.GetFiles() {
		fmt.Fprintf(a.out, "  %s: %s\n", control.Printable("/"+string(f.GetPath())), control.Message(f.GetWhy()))
	}
	if more := left.GetTotal() - int64(len(left.GetFiles())); more > 0 {
		fmt.Fprintf(a.out, "  and %d more\n", more)
	}
	return nil
}

// load reads a profile from a file, or asks the daemon for that of an image.
func (a *app) load(c *cobra.Command, name string) (profile.Profile, error) {
	if name == "-" {
		p, err := profile.Decode(c.InOrStdin())
		if err != nil {
			return profile.Profile{}, fmt.Errorf("standard input: %w", err)
		}
		return p, nil
	}
	info, err := os.Stat(name)
	file := err == nil && info.Mode().IsRegular()
	// What can be no image is a file that is not there.
	if file || strings.HasPrefix(name, "/") || strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".json") {
		f, err := os.Open(name)
		if err != nil {
			return profile.Profile{}, fmt.Errorf("read profile: %w", err)
		}
		defer f.Close()
		p, err := profile.Decode(f)
		if err != nil {
			return profile.Profile{}, fmt.Errorf("%s: %w", name, err)
		}
		return p, nil
	}
	_, data, err := a.getProfile(c.Context(), name)
	if err != nil {
		return profile.Profile{}, err
	}
	return profile.Decode(bytes.NewReader(data))
}
