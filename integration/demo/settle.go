// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// usage is what an image takes of NVM, in bytes.
type usage struct {
	Files int64 `json:"files"`
	Parts int64 `json:"parts"` // of large files
	Views int64 `json:"views"`
}

func (u usage) all() int64 { return u.Files + u.Parts + u.Views }

// onNVM asks the daemon for what stands on NVM.
func onNVM(ctx context.Context, client control.Client, r *rig.Rig) (u usage, err error) {
	answer, err := client.Usage(ctx, &control.UsageRequest{Namespace: r.Namespace})
	if err != nil {
		return u, fmt.Errorf("ask for the use of the tiers: %w", err)
	}
	for _, t := range answer.GetTiers() {
		if t.GetName() == placement.NVM.String() {
			u = usage{Files: t.GetLayers(), Parts: t.GetParts(), Views: t.GetViews()}
		}
	}
	return u, nil
}

// quiet is when the demo takes a start for over: its program is done by then.
const quiet = time.Second

// settle waits until the start is recorded, all packs are whole, and the files and parts on NVM are those that the profile
// asks for.
func (rep *report) settle(ctx context.Context, client control.Client, r *rig.Rig) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// Parts are made of files whose pack is whole.
	_, err := awaitImage(ctx, client, r, "home", func(l *control.Layer) bool { return l.GetState() == "home" })
	if err != nil {
		return err
	}
	top, err := client.Top(ctx, &control.TopRequest{IntervalMilliseconds: 200})
	if err != nil {
		return fmt.Errorf("watch migration: %w", err)
	}
	for planned := false; ; {
		s, err := top.Recv()
		if err != nil {
			return fmt.Errorf("wait for migration: %w", err)
		}
		if s.GetTraceError() != "" {
			return fmt.Errorf("starts are not traced here: %s", s.GetTraceError())
		}
		if planned && s.GetMigration().GetState() == "idle" {
			break // parts are made, too
		}
		if !planned && s.GetStartsTotal() > 0 && len(s.GetStarts()) == 0 {
			// It returns with a plan that knows of the start and of the whole packs: what is idle after it is done.
			if _, err := client.MigrateNow(ctx, &control.MigrationRequest{}); err != nil {
				return fmt.Errorf("migrate now: %w", err)
			}
			planned = true
		}
	}
	if rep.AfterStart, err = onNVM(ctx, client, r); err != nil {
		return err
	}
	p, err := profileOf(ctx, client, r)
	if err != nil {
		return fmt.Errorf("ask for the profile: %w", err)
	}
	rep.Files = int64(len(p.Files))
	for _, f := range p.Files {
		rep.Opened += f.Size
		if f.Touched < 0 {
			f.Touched = f.Size
		}
		rep.Touched += f.Touched
	}
	return nil
}

func profileOf(ctx context.Context, client control.Client, r *rig.Rig) (p profile.Profile, err error) {
	stream, err := client.GetProfile(ctx, &control.ImageRequest{Image: r.Ref(imageName), Namespace: r.Namespace})
	if err != nil {
		return p, err
	}
	var data bytes.Buffer
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return profile.Decode(&data)
		}
		if err != nil {
			return p, err
		}
		data.Write(part.GetData())
	}
}
