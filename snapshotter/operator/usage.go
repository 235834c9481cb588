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
	names, untold := s.imageNames(ctx, all)
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
	tops := orphans(all, names, untold)
	needed := map[store.LayerID]bool{} // by a snapshot that is no orphan, in any namespace
	for _, sn := range all {
		needed[sn.Layer] = needed[sn.Layer] || !tops[sn.Info.Name]
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
		c, err := s.count(ctx, sn)
		if err != nil {
			return nil, err
		}
		if sn.Info.Kind != snapshots.KindCommitted {
			for t, n := range c.bytes {
				totals[t].Uppers += n
			}
			continue
		}
		goes := tops[sn.Info.Name] && !needed[sn.Layer] // the layer goes with its orphans
		if !seen[sn.Layer] {
			seen[sn.Layer] = true
			for t, n := range c.bytes {
				if goes {
					totals[t].Orphans += n
				} else {
					totals[t].Layers += n
				}
			}
		}
		for _, name := range namesOf(sn, names) {
			if o := (owner{sn.NS(), name}); !slices.Contains(owners[sn.Layer], o) {
				owners[sn.Layer] = append(owners[sn.Layer], o)
			}
		}
		if tops[sn.Info.Name] {
			out.Orphans = append(out.Orphans, orphan(sn, c, goes))
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

// orphans are the committed snapshots, by their keys, that neither an image nor another snapshot needs. Of namespaces whose
// images are not told nothing is one.
func orphans(all []store.Entry, names map[string][]string, untold map[string]bool) map[string]bool {
	parents := map[string]bool{}
	for _, sn := range all {
		parents[sn.Info.Parent] = true
	}
	out := map[string]bool{}
	for _, sn := range all {
		if sn.Info.Kind == snapshots.KindCommitted && !untold[sn.NS()] && !parents[sn.Info.Name] && len(namesOf(sn, names)) == 0 {
			out[sn.Info.Name] = true
		}
	}
	return out
}

// orphan describes one of [orphans]. goes reports whether its layer goes with it.
func orphan(sn store.Entry, c counted, goes bool) *control.Orphan {
	o := &control.Orphan{Id: sn.ID, Key: sn.Info.Name, Reason: "no image and no container refers to it; containerd's garbage collection decides"}
	if goes {
		o.NvmBytes, o.HddBytes = c.bytes[placement.NVM], c.bytes[placement.HDD]
	} else {
		o.Reason += "; another snapshot has its layer, which stays"
	}
	return o
}

// counted is what a snapshot takes, without those below it.
type counted struct {
	known  bool
	bytes  [2]int64 // by placement.Tier
	inodes int64
}

// count counts what a snapshot takes. A directory, that of an active snapshot or of a layer that is not packed yet, is walked
// until ctx ends, and is not known if it has gone meanwhile.
func (s backend) count(ctx context.Context, sn store.Entry) (counted, error) {
	c, id := recorded(sn)
	if id == "" {
		return c, nil
	}
	t, usage, err := s.store.Written(ctx, id)
	if errdefs.IsNotFound(err) {
		return c, nil
	}
	c.known, c.bytes[t], c.inodes = err == nil, usage.Size, usage.Inodes
	return c, err
}

// recorded is what the database knows of what a snapshot takes, or else the id of the directory that is to be walked.
func recorded(sn store.Entry) (c counted, dir string) {
	switch {
	case sn.Info.Kind == snapshots.KindActive:
		return c, sn.ID
	case sn.Info.Kind == snapshots.KindView || sn.Of == nil:
		return counted{known: true}, ""
	case sn.Of.State == store.Staged:
		return c, sn.Of.Snapshot
	}
	return counted{known: true, bytes: sn.Of.Bytes(), inodes: sn.Of.Usage.Inodes}, ""
}
