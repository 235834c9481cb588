// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package operator answers nhybridctl and Prometheus: what stands where, and why.
// It reads the store and changes nothing but what the operator asks for, profiles
// and the pace of migration.
package operator

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Source tells what containerd has; implemented by [pull.Watcher]. Without it,
// images are known by what the pulls left in the database.
type Source interface {
	Images(ctx context.Context, namespace string) ([]*pull.Image, error)
	// Lookup returns at least one image, the likeliest first.
	Lookup(ctx context.Context, namespace, ref string) ([]*pull.Image, error)
	Container(ctx context.Context, namespace, id string) (pull.Container, error)
	Version(ctx context.Context) (string, error)
	Address() string
}

// Pulls tells of the pulls that are running.
type Pulls interface {
	Count() int
	// Subscribe returns a channel of events, which begins with what is running and is
	// closed when the daemon stops, and a function that ends it.
	Subscribe() (<-chan *control.Event, func())
}

// Config is what a backend answers from.
type Config struct {
	Store  *store.Store
	Policy placement.Policy
	Pulls  Pulls
	Source Source       // nil: no containerd is configured
	Hot    *hif.Manager // nil: the daemon keeps no hot files
	// HotConfig is that of Hot.
	HotConfig *hif.Config
}

// backend is [Config] at work.
type backend struct {
	store     *store.Store
	policy    placement.Policy
	pulls     Pulls
	source    Source
	hot       *hif.Manager
	hotConfig *hif.Config
}

// New returns what answers nhybridctl. Its methods may be called from several goroutines.
func New(c Config) control.Backend { return newBackend(c) }

func newBackend(c Config) backend {
	return backend{store: c.Store, policy: c.Policy, pulls: c.Pulls, source: c.Source, hot: c.Hot, hotConfig: c.HotConfig}
}

func (s backend) images() (Source, error) {
	if s.source == nil {
		return nil, fmt.Errorf("no containerd is configured: %w", errdefs.ErrUnavailable)
	}
	return s.source, nil
}

// Status implements [control.Backend].
func (s backend) Status(ctx context.Context) (*control.StatusResponse, error) {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return nil, err
	}
	removed, err := s.store.Removed(ctx)
	if err != nil {
		return nil, err
	}
	f := s.store.Features()
	r := &control.StatusResponse{
		Policy: s.policy.Name(),
		Kernel: &control.Kernel{
			Release: f.Kernel, DataOnly: f.DataOnly, Metacopy: f.Metacopy, FileBacked: f.FileBacked, StackOk: f.StackOK,
			Loop: f.Loop, IdMap: f.IDMap, IndexOff: f.IndexOff, UserNs: f.UserNS,
		},
	}
	for _, sn := range all {
		if sn.Info.Kind == snapshots.KindCommitted {
			r.Committed++
		} else {
			r.Active++
		}
	}
	for _, l := range s.store.Layers() {
		if l.Damaged == "" && l.Users > 0 && (l.State == store.Staged || l.State == store.Stored) {
			r.NotDurable++
		}
	}
	space := s.space()
	for _, t := range tier.Tiers {
		m, err := s.tierStatus(t)
		if err != nil {
			return nil, err
		}
		for _, kind := range space[t] {
			m.Used += kind.Bytes
		}
		r.Tiers = append(r.Tiers, m)
	}
	if r.Warnings, err = s.warnings(ctx, all); err != nil {
		return nil, err
	}
	work := s.store.Work()
	holes := work.Holes
	if !s.store.WritesBack() { // they are not filled unless somebody asks
		holes = 0
	}
	r.Queues = []*control.Queue{
		{Name: "background", Waiting: int64(work.Background), Failed: int64(work.Failing), LastError: work.LastError},
		{Name: "unpack", Running: int64(work.Unpacking)},
		{Name: "sync", Waiting: int64(work.Unsynced)},
		{Name: "database copy", Waiting: work.Database},
		{Name: "remove", Waiting: int64(len(removed))},
		{Name: "write-back", Waiting: int64(holes)},
	}
	r.Pulls = int64(s.pulls.Count())
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
	room, err := s.store.Room(t)
	if err != nil {
		return nil, err
	}
	m := &control.Tier{
		Name: t.String(), Root: s.store.Tiers.Root(t), Free: room.Free, Total: room.Total, Reserve: room.Reserve,
		InodesFree: room.InodesFree, Inodes: room.Inodes, Quota: s.store.Quota.Enforced(t),
	}
	if d, err := host.Facts(s.store.Tiers.Root(t)); err == nil {
		m.Filesystem, m.Device, m.Dax = d.Filesystem, d.Source, d.DAX == host.Yes
	}
	return m, nil
}

// List implements [control.Backend].
func (s backend) List(ctx context.Context, r *control.ListRequest, send func(*control.Snapshot) error) error {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return err
	}
	names, _ := s.imageNames(ctx, all)
	for _, sn := range parentsFirst(all) {
		if r.Namespace != "" && sn.NS() != r.Namespace {
			continue
		}
		c, _ := recorded(sn)
		if r.Count {
			if c, err = s.count(ctx, sn); err != nil {
				return err
			}
		}
		if err := send(s.message(sn, c, names)); err != nil {
			return err
		}
	}
	return nil
}

// parentsFirst sorts by id: a parent is always the older one.
func parentsFirst(all []store.Entry) []store.Entry {
	slices.SortFunc(all, func(a, b store.Entry) int {
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
	sorted, seen := make([]store.Entry, 0, len(all)), make([]bool, len(all))
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

// imageNames tells which images a layer belongs to, by "<namespace> <chain id>", and of which namespaces containerd did not
// tell its images.
func (s backend) imageNames(ctx context.Context, all []store.Entry) (names map[string][]string, untold map[string]bool) {
	names, untold = map[string][]string{}, map[string]bool{}
	add := func(ns, chainID, name string) {
		k := ns + " " + chainID
		if name != "" && !slices.Contains(names[k], name) {
			names[k] = append(names[k], name)
		}
	}
	source, err := s.images()
	asked := map[string]bool{}
	for _, sn := range all {
		ns := sn.NS()
		if err != nil || asked[ns] { // without a containerd its images are none
			continue
		}
		asked[ns] = true
		images, err := source.Images(ctx, ns)
		if err != nil {
			untold[ns] = true
			continue
		}
		for _, img := range images {
			for _, l := range img.Layers {
				add(ns, l.ChainID.String(), img.Name)
			}
		}
	}
	for _, sn := range all {
		if sn.Image != nil && len(names[sn.NS()+" "+sn.ChainID]) == 0 {
			add(sn.NS(), sn.ChainID, sn.Image.Name)
		}
	}
	return names, untold
}

// message describes a snapshot, of which c is known.
func (s backend) message(sn store.Entry, c counted, names map[string][]string) *control.Snapshot {
	m := &control.Snapshot{
		Id: sn.ID, Key: sn.Info.Name, Namespace: sn.NS(), Name: store.ClientKey(sn.Info.Name), Parent: sn.Info.Parent,
		Kind: strings.ToLower(sn.Info.Kind.String()), Tier: sn.Tier.String(), Labels: sn.Info.Labels, Created: timestamppb.New(sn.Info.Created),
		ViewBytes: s.viewBytes(sn.ID), Images: namesOf(sn, names),
	}
	if l := sn.Of; l != nil {
		m.Tier, m.State, m.Layer = l.Stands(), string(l.State), l.ID.String()
		m.Durable, m.Error = l.State == store.Durable || l.State == store.Home, s.store.Trouble(l.ID, sn.NS(), m.Images...)
	}
	if sn.Info.Kind == snapshots.KindView { // nothing is written to it
		m.Tier = ""
	}
	if c.known {
		m.NvmBytes, m.HddBytes, m.Inodes = &c.bytes[placement.NVM], &c.bytes[placement.HDD], &c.inodes
	}
	return m
}

// Watch implements [control.Backend].
func (s backend) Watch(ctx context.Context, r *control.WatchRequest, send func(*control.Event) error) error {
	events, cancel := s.pulls.Subscribe()
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
