// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const controlSocket = "/run/nhybrid/control.sock"

func (g *guest) status(ctx context.Context) (*control.StatusResponse, error) {
	client, hangUp, err := control.Dial(controlSocket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hangUp() }()
	return client.Status(ctx, &control.StatusRequest{})
}

func (g *guest) inspect(ctx context.Context) (*control.InspectResponse, error) {
	client, hangUp, err := control.Dial(controlSocket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hangUp() }()
	return client.Inspect(ctx, &control.InspectRequest{Ref: g.image(), Namespace: "default"})
}

// checkStatus shows what the daemon has found out about this machine: a kernel that needs metacopy=on, DAX on NVM only,
// project quotas on both tiers.
func (g *guest) checkStatus(ctx context.Context) error {
	s, err := g.status(ctx)
	if err != nil {
		return err
	}
	if !s.GetKernel().GetMetacopy() {
		return fmt.Errorf("kernel %s: metacopy=on is not in use", s.GetKernel().GetRelease())
	}
	for _, t := range s.GetTiers() {
		if want := t.GetName() == "nvm"; t.GetDax() != want {
			return fmt.Errorf("tier %s on %s: DAX %v, want %v", t.GetName(), t.GetFilesystem(), t.GetDax(), want)
		}
		if !t.GetQuota() {
			return fmt.Errorf("tier %s on %s: no quota, want one", t.GetName(), t.GetFilesystem())
		}
	}
	if n := len(s.GetTiers()); n != 2 {
		return fmt.Errorf("%d tiers, want 2", n)
	}
	return nil
}

// bothTiers shows that the policy was followed: the files of the lowest layer went to its pack, those of the others to NVM,
// which their packs say for good.
func (g *guest) bothTiers(ctx context.Context) error {
	r, err := g.inspect(ctx)
	if err != nil {
		return err
	}
	if n := len(r.GetLayers()); n != 3 {
		return fmt.Errorf("%d layers, want 3", n)
	}
	for i, layer := range r.GetLayers() {
		want := "nvm"
		if i == 0 {
			want = "hdd"
		}
		if got := layer.GetDecision().GetTier(); got != want {
			return fmt.Errorf("layer %d was to go to %q, want %q: %s", i, got, want, layer.GetDecision().GetReason())
		}
		holes, files, err := holesOf(filepath.Join(hdd, "nhybrid", "p", layer.GetLayer()+".erofs"))
		if err != nil {
			return err
		}
		if files == 0 || holes != map[bool]int{true: files}[i > 0] {
			return fmt.Errorf("layer %d for %s: %d of %d files are holes in the pack", i, want, holes, files)
		}
	}
	return nil
}

// holesOf counts the data files of a pack, and those that went to NVM alone when it was written.
func holesOf(path string) (holes, files int, err error) {
	p, err := pack.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer p.Close()
	index, err := p.Index()
	if err != nil {
		return 0, 0, err
	}
	for n := uint32(1); n <= index.Len(); n++ {
		if e, ok := index.At(n); ok {
			files++
			if e.Hole {
				holes++
			}
		}
	}
	return holes, files, nil
}

// keepOn has a file of the image kept on a tier, by a rule of its profile, and waits until it stands there.
func (g *guest) keepOn(ctx context.Context, tier, path string) error {
	client, hangUp, err := control.Dial(controlSocket)
	if err != nil {
		return err
	}
	defer func() { _ = hangUp() }()
	action := profile.Exclude
	if tier == "nvm" {
		action = profile.Pin
	}
	rule := &control.SetRuleRequest{Image: g.image(), Namespace: "default", Glob: path, Action: string(action)}
	if _, err := client.SetRule(ctx, rule); err != nil {
		return fmt.Errorf("%s %q: %w", action, path, err)
	}
	return poll(ctx, func() error {
		why, err := client.Why(ctx, &control.WhyRequest{Image: g.image(), Namespace: "default", Path: []byte(path)})
		if err == nil && why.GetFile().GetTier() != tier {
			err = fmt.Errorf("%q is on %q: %s", path, why.GetFile().GetTier(), why.GetFile().GetReason())
		}
		return err
	})
}

// durable waits until the daemon promises that the image survives a power cut.
func (g *guest) durable(ctx context.Context) error {
	return poll(ctx, func() error {
		r, err := g.inspect(ctx)
		if err != nil {
			return err
		}
		for i, layer := range r.GetLayers() {
			if !layer.GetDurable() {
				return fmt.Errorf("layer %d is not durable yet", i)
			}
		}
		if len(r.GetLayers()) == 0 {
			return fmt.Errorf("list layers: %w", errNone)
		}
		return nil
	})
}

// tiersEmpty waits until no data, staging directory, tree, capture or region is left on either tier, and no link or mount beside them.
func (g *guest) tiersEmpty(ctx context.Context) error {
	return poll(ctx, func() error {
		for _, dir := range []string{"k", "tmp"} {
			left, err := filepath.Glob(filepath.Join(nvm, "nhybrid/r", dir, "*"))
			if err != nil {
				return err
			}
			if len(left) > 0 {
				return fmt.Errorf("still there: %s", strings.Join(left, " "))
			}
		}
		for _, dir := range []string{nvm + "/nhybrid", hdd + "/nhybrid", "/run/nhybrid/state/*"} {
			// What may stay are the databases, the store's name, and r with the pool of regions.
			left, err := filepath.Glob(filepath.Join(dir, "[^r]", "*"))
			if err != nil {
				return err
			}
			if len(left) > 0 {
				return fmt.Errorf("still there: %s", strings.Join(left, " "))
			}
		}
		mounts, err := mountsBelow("/run/nhybrid")
		if err == nil && len(mounts) > 0 {
			err = fmt.Errorf("still mounted: %s", strings.Join(mounts, " "))
		}
		return err
	})
}

// quota shows that a container whose snapshot has a largest size cannot write more to the tier, and that one without can.
func (g *guest) quota(ctx context.Context, tier string) error {
	const limit, tried = 4 << 20, 8 // bytes, MiB
	write := []string{"/bin/dd", "if=/dev/zero", "of=/data/large", "bs=1M", fmt.Sprintf("count=%d", tried)}
	upper := []string{"--snapshotter-label", "containerd.io/snapshot/nhybrid.upper-tier=" + tier}
	if _, err := g.runOnce(ctx, "unlimited", upper, write...); err != nil {
		return fmt.Errorf("without a limit: %w", err)
	}
	out, err := g.runOnce(ctx, "limited", append(upper, "--snapshotter-label", fmt.Sprintf("containerd.io/snapshot/max-size=%d", limit)), write...)
	if err == nil {
		return fmt.Errorf("%d MiB could be written with a limit of %d bytes", tried, limit)
	}
	// ext4 says EDQUOT, XFS ENOSPC for a project (xfs_quota(8)).
	if !strings.Contains(out, "No space left on device") && !strings.Contains(out, "quota exceeded") && !strings.Contains(out, "Quota exceeded") {
		return fmt.Errorf("with a limit: %w", err)
	}
	return nil
}
