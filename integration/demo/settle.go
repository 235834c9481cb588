// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

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
	for done := false; !done; {
		s, err := top.Recv()
		if err != nil {
			return fmt.Errorf("wait for migration: %w", err)
		}
		if s.GetTraceError() != "" {
			return fmt.Errorf("starts are not traced here: %s", s.GetTraceError())
		}
		done = s.GetStartsTotal() > 0 && len(s.GetStarts()) == 0 && s.GetMigration().GetState() == "idle"
	}
	if rep.AfterStart, err = onNVM(ctx, client, r); err != nil {
		return err
	}
	profile, err := client.GetProfile(ctx, &control.ImageRequest{Image: r.Ref(imageName), Namespace: r.Namespace})
	if err != nil {
		return fmt.Errorf("ask for the profile: %w", err)
	}
	first, err := profile.Recv()
	if err != nil {
		return fmt.Errorf("ask for the profile: %w", err)
	}
	rep.Files = first.GetInfo().GetFiles()
	return nil
}
