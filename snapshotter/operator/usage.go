// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

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
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Usage implements [control.Backend].
func (s backend) Usage(ctx context.Context, r *control.UsageRequest) (*control.UsageResponse, error) {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return nil, err
	}
	out := &control.UsageResponse{}
	names := s.imageNames(ctx, all)
	images := map[string]*control.ImageUsage{}
	var totals [2]*control.TierUsage
	for _, t := range tier.Tiers {
		free, total, err := s.store.Tiers.Space(t)
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
	type owner struct{ ns, name string }
	owners := map[store.LayerID][]owner{} // a layer may belong to several images, and to several namespaces
	seen := map[store.LayerID]bool{}
	for _, sn := range all {
		if r.Namespace != "" && sn.NS() != r.Namespace {
			continue
		}
		for t, n := range s.store.ViewBytes(sn.ID) {
			totals[t].Views += n
		}
		if sn.Info.Kind != snapshots.KindCommitted {
			n, err := s.upperBytes(ctx, sn)
			if err != nil {
				return nil, err
			}
			totals[sn.Tier].Uppers += n
			continue
		}
		n, h := sn.Bytes()
		if !seen[sn.Layer] {
			seen[sn.Layer] = true
			totals[placement.NVM].Layers += n
			totals[placement.HDD].Layers += h
		}
		known := names[sn.NS()+" "+store.ClientKey(sn.Info.Name)]
		for _, name := range known {
			if o := (owner{sn.NS(), name}); !slices.Contains(owners[sn.Layer], o) {
				owners[sn.Layer] = append(owners[sn.Layer], o)
			}
		}
		if len(known) == 0 && !children[sn.Info.Name] {
			out.Orphans = append(out.Orphans, &control.Orphan{
				Id: sn.ID, Key: sn.Info.Name, NvmBytes: n, HddBytes: h, Reason: "no image and no container refers to it; containerd's garbage collection decides",
			})
		}
	}
	for id, all := range owners {
		l, err := s.store.Layer(id)
		if err != nil {
			continue // removed meanwhile
		}
		b := l.Bytes()
		n, h := b[placement.NVM], b[placement.HDD]
		for _, o := range all {
			k := o.ns + " " + o.name
			u := images[k]
			if u == nil {
				u = &control.ImageUsage{Name: o.name, Namespace: o.ns}
				images[k] = u
			}
			u.Layers++
			if len(all) == 1 {
				u.NvmOwn, u.HddOwn = u.NvmOwn+n, u.HddOwn+h
			} else {
				u.NvmShared, u.HddShared = u.NvmShared+n, u.HddShared+h
			}
		}
	}
	totals[placement.NVM].Parts += filesIn(filepath.Join(s.store.Tiers.Root(placement.NVM), "parts"))
	for _, t := range tier.Tiers {
		if st, err := os.Stat(s.store.DatabasePath(t)); err == nil {
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

// upperBytes walks the writable directory of an active snapshot; one that goes
// meanwhile counts nothing.
func (s backend) upperBytes(ctx context.Context, sn store.Entry) (int64, error) {
	t, err := s.store.Tiers.StagedOn(sn.ID)
	if errdefs.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	du, err := fs.DiskUsage(ctx, s.store.Tiers.Upper(t, sn.ID))
	if os.IsNotExist(err) {
		return 0, nil
	}
	return du.Size, err
}
