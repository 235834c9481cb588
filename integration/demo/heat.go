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

// heat is what became of the image after its first start. Sizes are bytes.
type heat struct {
	Files     int64  `json:"files"` // that starts opened
	Stored    int64  `json:"stored"`
	NVMBefore int64  `json:"nvm_before"` // after the pull
	NVMAfter  int64  `json:"nvm_after"`
	Again     result `json:"again"` // the second start
}

// quiet is when the demo takes a start for over: its program is done by then.
const quiet = time.Second

// cool waits until the start is recorded and cold files have left NVM.
func (rep *report) cool(ctx context.Context, client control.Client, r *rig.Rig) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, l := range rep.Layers {
		rep.Heat.Stored += l.Stored
		rep.Heat.NVMBefore += l.nvm
	}
	top, err := client.Top(ctx, &control.TopRequest{IntervalMilliseconds: 200})
	if err != nil {
		return fmt.Errorf("watch migration: %w", err)
	}
	parts := int64(0)
	for {
		s, err := top.Recv()
		if err != nil {
			return fmt.Errorf("wait for migration: %w", err)
		}
		if s.GetTraceError() != "" {
			return fmt.Errorf("starts are not traced here: %s", s.GetTraceError())
		}
		if s.GetStartsTotal() == 0 || len(s.GetStarts()) > 0 || s.GetMigration().GetState() != "idle" {
			continue
		}
		for _, t := range s.GetTiers() {
			for _, k := range t.GetSpace() {
				if k.GetKind() == "parts" {
					parts += k.GetBytes()
				}
			}
		}
		break
	}
	answer, err := client.Inspect(ctx, &control.InspectRequest{Ref: r.Ref(imageName), Namespace: r.Namespace})
	if err != nil {
		return fmt.Errorf("inspect the image: %w", err)
	}
	rep.Heat.NVMAfter = parts
	for _, l := range answer.GetLayers() {
		rep.Heat.NVMAfter += l.GetNvmBytes()
	}
	profile, err := client.GetProfile(ctx, &control.ImageRequest{Image: r.Ref(imageName), Namespace: r.Namespace})
	if err != nil {
		return fmt.Errorf("ask for the profile: %w", err)
	}
	first, err := profile.Recv()
	if err != nil {
		return fmt.Errorf("ask for the profile: %w", err)
	}
	rep.Heat.Files = first.GetInfo().GetFiles()
	return nil
}

func (rep *report) printHeat() {
	h := rep.Heat
	share := func(n int64) string {
		return fmt.Sprintf("%s (%.0f %%)", placement.FormatBytes(n), 100*float64(n)/float64(h.Stored))
	}
	fmt.Printf("It opened %d files. On NVM: %s after the pull, %s now.\n", h.Files, share(h.NVMBefore), share(h.NVMAfter))
	fmt.Printf("The second start's first output came %d ms after `ctr run` began.\n", h.Again.ReadyMS)
}
