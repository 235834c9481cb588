// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/nhybrid/nhybrid/snapshotter/control"
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

// bothTiers shows that the policy was followed and that the bytes stand where the daemon says.
func (g *guest) bothTiers(ctx context.Context) error {
	r, err := g.inspect(ctx)
	if err != nil {
		return err
	}
	if n := len(r.GetLayers()); n != 3 {
		return fmt.Errorf("%d layers, want 3", n)
	}
	for i, layer := range r.GetLayers() {
		want, root := "nvm", nvm
		if i == 0 {
			want, root = "hdd", hdd
		}
		if layer.GetTier() != want {
			return fmt.Errorf("layer %d is on %q, want %q: %s", i, layer.GetTier(), want, layer.GetDecision().GetReason())
		}
		dir := filepath.Join(root, "nhybrid", "d", layer.GetSnapshotId())
		if files, err := regularFiles(dir); err != nil || len(files) == 0 {
			return fmt.Errorf("find data of layer %d below %s: %w", i, dir, errors.Join(err, errNone))
		}
	}
	return nil
}

func regularFiles(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, name)
		}
		return err
	})
	return files, err
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
