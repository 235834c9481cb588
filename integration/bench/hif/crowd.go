// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/integration/bench/lab"
)

// crowdRow is containers that were started at the same time.
type crowdRow struct {
	Images []string `json:"images"`
	// Seconds until the last was ready, cold: at the first start of each image, and after migration.
	First  map[string]start `json:"first"`
	Second map[string]start `json:"second"`
	// Profiles by image, as they were after the first starts.
	Profiles map[string]mixed `json:"profiles"`
}

// mixed is what a profile that was traced in a crowd has of other images.
type mixed struct {
	Files  int `json:"files"`
	Starts int `json:"starts"`
	// Outside are files that are in none of the image's layers.
	Outside int `json:"outside"`
	// Foreign are files that the same image, started alone, does not open, but another one of the crowd does. Lacking are
	// those that it opens alone and that are not in the profile: starts differ.
	Foreign int `json:"foreign"`
	Lacking int `json:"lacking"`
	// Beyond are all files that it does not open alone.
	Beyond int `json:"beyond"`
}

// crowd starts a container of each of the named images at once.
func (b *bench) crowd(ctx context.Context, names []string) (r *crowdRow, err error) {
	r = &crowdRow{Images: names, First: map[string]start{}, Second: map[string]start{}, Profiles: map[string]mixed{}}
	s, err := b.newStand(ctx, setup{size: b.deviceSize, hdd: true, overlay: true, config: patient})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, fmt.Sprintf("crowd-%d", len(names)))
		err = errors.Join(err, s.Close())
	}()
	distinct := slices.Compact(slices.Sorted(slices.Values(names)))
	for _, name := range distinct {
		if err := s.push(ctx, ref(name), b.images[name]); err != nil {
			return nil, err
		}
		for _, v := range variants {
			if err := s.places[v].pull(ctx, ref(name)); err != nil {
				return nil, err
			}
		}
	}
	if err := s.daemon.settled(ctx); err != nil {
		return nil, err
	}
	profiles := map[string]*profile.Profile{}
	for _, v := range variants {
		if r.First[v], err = b.atOnce(ctx, s, v, names, "first", profiles); err != nil {
			return nil, err
		}
	}
	if err := s.disarm(); err != nil {
		return nil, err
	}
	if _, err := s.daemon.migrate(ctx); err != nil {
		return nil, err
	}
	// overlayfs on HDD knows no difference between a first and a second start.
	for _, v := range []string{overlayNVM, hybrid} {
		if r.Second[v], err = b.atOnce(ctx, s, v, names, "second", nil); err != nil {
			return nil, err
		}
	}
	r.Second[overlayHDD] = r.First[overlayHDD]
	if err := s.disarm(); err != nil {
		return nil, err
	}
	return r, b.unmixed(ctx, s, distinct, profiles, r.Profiles)
}

// atOnce starts all containers at once, cold, and removes them. Profiles, if set, gets those of the images.
func (b *bench) atOnce(ctx context.Context, s *stand, variant string, names []string, when string, profiles map[string]*profile.Profile) (total start, err error) {
	if err := s.arm(); err != nil {
		return total, err
	}
	if err := lab.DropCaches(b.options.dropCaches); err != nil {
		return total, err
	}
	p := s.places[variant]
	containers := make([]*started, len(names))
	defer func() {
		for _, c := range containers {
			if c != nil {
				err = errors.Join(err, c.remove(ctx))
			}
		}
	}()
	var before lab.Counters
	if p.disk != nil {
		if before, err = lab.CountersOf(p.disk.Mountpoint()); err != nil {
			return total, err
		}
	}
	begun := time.Now()
	group, inGroup := errgroup.WithContext(ctx)
	for i, name := range names {
		group.Go(func() (err error) {
			containers[i], err = p.start(inGroup, b.known[name], fmt.Sprintf("%s-%d-%s", when, i, name), nil)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return total, err
	}
	total.ReadyS = time.Since(begun).Seconds()
	if p.disk != nil {
		after, err := lab.CountersOf(p.disk.Mountpoint())
		if err != nil {
			return total, err
		}
		d := after.Minus(before)
		total.Reads, total.ReadBytes = d.Reads, d.ReadBytes
	}
	if variant != hybrid || profiles == nil {
		return total, nil
	}
	count := map[string]int{}
	for _, name := range names {
		count[name]++
	}
	for i := range names {
		if err := s.daemon.ready(ctx, containers[i].id); err != nil {
			return total, err
		}
	}
	for i, name := range names {
		if profiles[name], err = s.daemon.recorded(ctx, containers[i], name, count[name]); err != nil {
			return total, err
		}
	}
	return total, nil
}

// unmixed starts each image alone, under strace and traced, and holds the profiles from the crowd against it.
func (b *bench) unmixed(ctx context.Context, s *stand, names []string, profiles map[string]*profile.Profile, results map[string]mixed) error {
	alone := map[string]map[string]bool{}
	for _, name := range names {
		used, m, err := b.alone(ctx, s, name, profiles[name])
		if err != nil {
			return err
		}
		alone[name], results[name] = used, m
	}
	for _, name := range names {
		m := results[name]
		for _, f := range profiles[name].Files {
			if alone[name][string(f.Path)] {
				continue
			}
			m.Beyond++
			for _, other := range names {
				if other != name && alone[other][string(f.Path)] {
					m.Foreign++
					break
				}
			}
		}
		results[name] = m
	}
	return nil
}

// alone is what an image opens by itself, under every name of each file: what strace sees, and what else the daemon does,
// for runc opens files too.
func (b *bench) alone(ctx context.Context, s *stand, name string, p *profile.Profile) (all map[string]bool, m mixed, err error) {
	img := b.known[name]
	v, err := s.places[overlayNVM].view(ctx, img, s.dir)
	if err != nil {
		return nil, m, err
	}
	defer func() { err = errors.Join(err, v.close(ctx)) }()
	files, err := v.list()
	if err != nil {
		return nil, m, err
	}
	number, err := s.daemon.starts(ctx, name)
	if err != nil {
		return nil, m, err
	}
	log, c, err := s.places[hybrid].straced(ctx, img, "alone-"+name, s.dir)
	if err != nil {
		return nil, m, err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	last, err := s.daemon.recorded(ctx, c, name, number+1)
	if err != nil {
		return nil, m, err
	}
	used, err := v.used(log, files)
	if err != nil {
		return nil, m, err
	}
	inodes := v.inodes(last, last.Starts)
	crowd := v.inodes(p, 0)
	for _, path := range used {
		inodes[files[path].inode] = true
		if !crowd[files[path].inode] {
			m.Lacking++
		}
	}
	all = map[string]bool{}
	for path, f := range files {
		if inodes[f.inode] {
			all[path] = true
		}
	}
	m.Files, m.Starts = len(p.Files), p.Starts+p.Incomplete
	for _, f := range p.Files {
		if v.inode(f.Layer, string(f.Path)) == 0 {
			m.Outside++
		}
	}
	return all, m, nil
}
