// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// Usage implements [control.Backend].
func (s backend) Usage(ctx context.Context, r *control.UsageRequest) (*control.UsageResponse, error) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	out := &control.UsageResponse{}
	names := s.imageNames(ctx, all)
	images := map[string]*control.ImageUsage{}
	var totals [2]*control.TierUsage
	for _, t := range tier.Tiers {
		free, total, err := s.tiers.Space(t)
		if err != nil {
			return nil, err
		}
		totals[t] = &control.TierUsage{Name: t.String(), Free: free, Total: total}
		out.Tiers = append(out.Tiers, totals[t])
	}
	children := map[string]bool{}
	for _, sn := range all {
		children[sn.Info.Parent] = true
	}
	for _, sn := range all {
		if r.Namespace != "" && sn.namespace() != r.Namespace {
			continue
		}
		s.addMetadata(sn.ID, totals)
		if sn.Info.Kind != snapshots.KindCommitted {
			n, err := s.upperBytes(ctx, sn)
			if err != nil {
				return nil, err
			}
			totals[sn.Tier].Uppers += n
			continue
		}
		n, h := sn.bytes()
		totals[placement.NVM].Layers += n
		totals[placement.HDD].Layers += h
		owners := names[sn.namespace()+" "+clientKey(sn.Info.Name)]
		for _, name := range owners {
			k := sn.namespace() + " " + name
			u := images[k]
			if u == nil {
				u = &control.ImageUsage{Name: name, Namespace: sn.namespace()}
				images[k] = u
			}
			u.Layers++
			if len(owners) == 1 {
				u.NvmOwn, u.HddOwn = u.NvmOwn+n, u.HddOwn+h
			} else {
				u.NvmShared, u.HddShared = u.NvmShared+n, u.HddShared+h
			}
		}
		if len(owners) == 0 && !children[sn.Info.Name] {
			out.Orphans = append(out.Orphans, &control.Orphan{
				Id: sn.ID, Key: sn.Info.Name, NvmBytes: n, HddBytes: h, Reason: "no image and no container refers to it; containerd's garbage collection decides",
			})
		}
	}
	for _, db := range []string{s.db.path, s.path(databaseFile)} {
		if st, err := os.Stat(db); err == nil {
			t := placement.HDD
			if db == s.db.path {
				t = placement.NVM
			}
			totals[t].Metadata += st.Size()
		}
	}
	for _, u := range images {
		out.Images = append(out.Images, u)
	}
	slices.SortFunc(out.Images, func(a, b *control.ImageUsage) int {
		return strings.Compare(a.Namespace+" "+a.Name, b.Namespace+" "+b.Name)
	})
	return out, nil
}

// addMetadata counts the tree image and the capture of a layer.
func (s backend) addMetadata(id string, totals [2]*control.TierUsage) {
	for i, image := range s.treeImages(id) {
		if st, err := os.Stat(image); err == nil {
			totals[tier.Tiers[i]].Trees += st.Size()
		}
	}
	if st, err := os.Stat(s.capturePath(id)); err == nil {
		totals[placement.HDD].Metadata += st.Size()
	}
}

// upperBytes walks the writable directory of an active snapshot; one that goes
// meanwhile counts nothing.
func (s backend) upperBytes(ctx context.Context, sn snapshot) (int64, error) {
	t, err := s.tiers.StagedOn(sn.ID)
	if errdefs.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	du, err := fs.DiskUsage(ctx, filepath.Join(s.tiers.Staging(t, sn.ID), "fs"))
	if os.IsNotExist(err) {
		return 0, nil
	}
	return du.Size, err
}
