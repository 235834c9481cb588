// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// backend answers nhybridctl. It is a type of its own since both contracts
// have a method Usage.
type backend struct{ *Snapshotter }

// Control answers what stands where, and why.
func (s *Snapshotter) Control() control.Backend { return backend{s} }

// ImageSource lists images; implemented by [pull.Watcher]. Without it, images
// are known by what the pulls left in the database.
type ImageSource interface {
	Images(ctx context.Context, namespace string) ([]*pull.Image, error)
	// Lookup returns at least one image, the likeliest first.
	Lookup(ctx context.Context, namespace, ref string) ([]*pull.Image, error)
	Version(ctx context.Context) (string, error)
	Address() string
}

func (s backend) images() (ImageSource, error) {
	i, ok := s.config.Downloads.(ImageSource)
	if !ok {
		return nil, fmt.Errorf("no containerd is configured: %w", errdefs.ErrUnavailable)
	}
	return i, nil
}

// Status implements [control.Backend].
func (s backend) Status(ctx context.Context) (*control.StatusResponse, error) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	removed, err := s.db.removed(ctx)
	if err != nil {
		return nil, err
	}
	f := s.features
	r := &control.StatusResponse{
		Policy: s.config.Policy.Name(),
		Kernel: &control.Kernel{
			Release: f.Kernel, DataOnly: f.DataOnly, Metacopy: f.Metacopy, FileBacked: f.FileBacked, StackOk: f.StackOK,
			Loop: f.Loop, IdMap: f.IDMap, IndexOff: f.IndexOff, UserNs: f.UserNS,
		},
	}
	var used [2]int64
	for _, sn := range all {
		n, h := sn.bytes()
		used[placement.NVM] += n
		used[placement.HDD] += h
		if sn.Info.Kind == snapshots.KindCommitted {
			r.Committed++
			if sn.Damaged != "" {
				r.Warnings = append(r.Warnings, fmt.Sprintf("layer %s has to be rebuilt: %s", sn.Info.Name, sn.Damaged))
			} else if !sn.Durable {
				r.NotDurable++
			}
		} else {
			r.Active++
		}
	}
	for _, t := range tier.Tiers {
		m, err := s.tierStatus(t)
		if err != nil {
			return nil, err
		}
		m.Used = used[t]
		if t == placement.NVM && m.Free < m.Reserve {
			r.Warnings = append(r.Warnings, fmt.Sprintf("NVM is full: %s free, the reserve is %s; layers and writable directories go to HDD",
				placement.FormatBytes(m.Free), placement.FormatBytes(m.Reserve)))
		}
		r.Tiers = append(r.Tiers, m)
	}
	if s.hot != nil {
		if _, err := s.hot.Stats(); err != nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("starts are not traced: %v", err))
		}
	}
	if s.tiers.SameFilesystem() {
		r.Warnings = append(r.Warnings, "root and nvm_root stand on one filesystem: placement has no effect")
	}
	s.homing.mu.Lock()
	r.Queues = []*control.Queue{
		{Name: "background", Waiting: int64(s.jobs.length())},
		{Name: "sync", Waiting: int64(s.syncer.waiting())},
		{Name: "database copy", Waiting: s.mirror.waiting()},
		{Name: "remove", Waiting: int64(len(removed))},
		{Name: "write-back", Waiting: int64(s.homing.left), Failed: s.homing.failed, LastError: s.homing.lastErr},
	}
	s.homing.mu.Unlock()
	s.placer.mu.Lock()
	r.Pulls = int64(len(s.placer.pulls))
	s.placer.mu.Unlock()
	if i, err := s.images(); err == nil {
		r.Containerd = &control.Containerd{Address: i.Address()}
		if r.Containerd.Version, err = i.Version(ctx); err != nil {
			r.Containerd.Error = err.Error()
		} else {
			r.Containerd.Reachable = true
		}
	}
	return r, nil
}

func (s backend) tierStatus(t placement.Tier) (*control.Tier, error) {
	free, total, err := s.tiers.Space(t)
	if err != nil {
		return nil, err
	}
	m := &control.Tier{Name: t.String(), Root: s.tiers.Root(t), Free: free, Total: total, Quota: s.quota.enforced[t]}
	if t == placement.NVM {
		m.Reserve = s.config.Reserve(total)
	}
	if d, err := host.Facts(s.tiers.Root(t)); err == nil {
		m.Filesystem, m.Device, m.Dax = d.Filesystem, d.Source, d.DAX == host.Yes
	}
	return m, nil
}

// bytes is what the data of a committed layer take on each tier. Copies that
// were written back stand on both.
func (sn snapshot) bytes() (nvm, hdd int64) {
	switch {
	case sn.Mixed:
		nvm = sn.NVMBytes
	case sn.Tier == placement.NVM:
		nvm = sn.Data
	}
	if sn.Tier == placement.HDD || sn.Home {
		hdd = sn.Data
	}
	return nvm, hdd
}

// trouble is why a layer cannot be used, and the cure; "" if it can.
func (sn snapshot) trouble() string {
	if sn.Damaged == "" {
		return ""
	}
	return sn.Damaged + "; it is rebuilt as soon as containerd gives its blob, else remove the image and pull it again"
}

// List implements [control.Backend].
func (s backend) List(ctx context.Context, r *control.ListRequest, send func(*control.Snapshot) error) error {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return err
	}
	names := s.imageNames(ctx, all)
	for _, sn := range parentsFirst(all) {
		if r.Namespace != "" && sn.namespace() != r.Namespace {
			continue
		}
		if err := send(s.message(sn, names)); err != nil {
			return err
		}
	}
	return nil
}

// parentsFirst sorts by id: a parent is always the older one.
func parentsFirst(all []snapshot) []snapshot {
	slices.SortFunc(all, func(a, b snapshot) int {
		if d := len(a.ID) - len(b.ID); d != 0 {
			return d
		}
		return strings.Compare(a.ID, b.ID)
	})
	// Except where containerd rebased: a layer of a parallel unpack may be older than the one below.
	at := map[string]int{}
	for i, sn := range all {
		at[sn.Info.Name] = i
	}
	sorted, seen := make([]snapshot, 0, len(all)), make([]bool, len(all))
	var put func(int)
	put = func(i int) {
		if seen[i] {
			return
		}
		seen[i] = true
		if p, ok := at[all[i].Info.Parent]; ok {
			put(p)
		}
		sorted = append(sorted, all[i])
	}
	for i := range all {
		put(i)
	}
	return sorted
}

func (sn snapshot) namespace() string {
	if sn.Namespace != "" {
		return sn.Namespace
	}
	ns, _, _ := strings.Cut(sn.Info.Name, "/")
	return ns
}

// imageNames tells which images a layer belongs to, by "<namespace> <chain id>".
func (s backend) imageNames(ctx context.Context, all []snapshot) map[string][]string {
	names := map[string][]string{}
	add := func(ns, chainID, name string) {
		k := ns + " " + chainID
		if name != "" && !slices.Contains(names[k], name) {
			names[k] = append(names[k], name)
		}
	}
	source, err := s.images()
	asked := map[string]bool{}
	for _, sn := range all {
		ns := sn.namespace()
		if err != nil || asked[ns] {
			continue
		}
		asked[ns] = true
		images, err := source.Images(ctx, ns)
		if err != nil {
			continue
		}
		for _, img := range images {
			for _, l := range img.Layers {
				add(ns, l.ChainID.String(), img.Name)
			}
		}
	}
	for _, sn := range all {
		if sn.Image != nil && len(names[sn.namespace()+" "+sn.ChainID]) == 0 {
			add(sn.namespace(), sn.ChainID, sn.Image.Name)
		}
	}
	return names
}

func (s backend) message(sn snapshot, names map[string][]string) *control.Snapshot {
	m := &control.Snapshot{
		Id: sn.ID, Key: sn.Info.Name, Namespace: sn.namespace(), Name: clientKey(sn.Info.Name), Parent: sn.Info.Parent,
		Kind: strings.ToLower(sn.Info.Kind.String()), Tier: sn.Tier.String(), Inodes: sn.Usage.Inodes,
		Captured: sn.Captured, Durable: sn.Durable, Labels: sn.Info.Labels, Created: timestamppb.New(sn.Info.Created),
		TreeBytes: s.treeBytes(sn.ID), Images: names[sn.namespace()+" "+clientKey(sn.Info.Name)], Error: sn.trouble(),
	}
	m.NvmBytes, m.HddBytes = sn.bytes()
	return m
}

// Watch implements [control.Backend].
func (s backend) Watch(ctx context.Context, r *control.WatchRequest, send func(*control.Event) error) error {
	p := s.placer
	p.mu.Lock()
	var first []*control.Event
	for _, pl := range p.running() {
		first = append(first, whole(pl))
	}
	events, cancel := p.watch.subscribe(first)
	p.mu.Unlock()
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-events:
			if !ok {
				return nil
			}
			if (r.Namespace != "" && e.Namespace != r.Namespace) || (r.Image != "" && !strings.HasPrefix(e.Image, r.Image)) {
				continue
			}
			if err := send(e); err != nil {
				return err
			}
		}
	}
}
