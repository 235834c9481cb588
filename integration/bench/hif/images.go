// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
)

// imageRow is an image from its pull to its second cold start.
type imageRow struct {
	Image    string `json:"image"`
	Category string `json:"category"`
	Sign     string `json:"sign"`
	Layers   int    `json:"layers"`
	// Files that are not empty, and their bytes, as a container sees them.
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`

	// First cold start of each variant, and the second ones in the order of the rounds.
	First  map[string]start   `json:"first"`
	Second map[string][]start `json:"second"`

	Space     space       `json:"space"`
	Migration migration   `json:"migration"`
	Trace     traceResult `json:"trace"`
	Integrity *integrity  `json:"integrity"`
	Static    prediction  `json:"static"`
	// HotBytes of files in the profile after the first start.
	HotFiles int   `json:"hot_files"`
	HotBytes int64 `json:"hot_bytes"`
	// Seconds that all of it took.
	Seconds float64 `json:"seconds"`
}

// space is by how much the used space of the filesystem on NVM has grown since before the pull.
type space struct {
	// AllNVM is with the overlayfs snapshotter.
	AllNVM int64 `json:"all_nvm"`
	// Pulled is after the pull, Migrated after first start and migration, with no container left.
	Pulled   int64 `json:"pulled"`
	Migrated int64 `json:"migrated"`
	// Fixed is what nhybrid takes when it has nothing: its database, above all.
	Fixed int64 `json:"fixed"`
}

func (s space) saved() float64    { return 1 - float64(s.Migrated)/float64(s.AllNVM) }
func (s space) savedAll() float64 { return 1 - float64(s.Migrated+s.Fixed)/float64(s.AllNVM) }

// traceResult compares one start as strace and as the daemon saw it.
type traceResult struct {
	Strace int `json:"strace"`
	Traced int `json:"traced"`
	// Missing are files that only strace saw.
	Missing []string `json:"missing,omitempty"`
	// Beyond are files that only the daemon saw: what runc itself opened, and what the start made and then replaced.
	Beyond int `json:"beyond"`
	// FirstLacks is how many of the files the first start had not used: starts differ.
	FirstLacks int  `json:"first_lacks"`
	Incomplete bool `json:"incomplete,omitempty"`
}

func (b *bench) image(ctx context.Context, img catalog.Image) (r *imageRow, err error) {
	begun := time.Now()
	r = &imageRow{
		Image: img.Name, Category: img.Category, Sign: img.Sign, Layers: len(img.Steps),
		First: map[string]start{}, Second: map[string][]start{},
	}
	s, err := b.newStand(ctx, setup{size: b.deviceSize, hdd: true, overlay: true, config: patient})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, img.Name)
		err = errors.Join(err, s.Close())
	}()
	t := &trial{bench: b, stand: s, img: img, row: r}
	for _, step := range []func(context.Context) error{t.pulls, t.firstStarts, t.migration, t.secondStarts, t.completeness} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	r.Seconds = time.Since(begun).Seconds()
	return r, nil
}

// trial is the way of one image through its stand.
type trial struct {
	*bench
	*stand
	img catalog.Image
	row *imageRow
	// The used space on NVM before the pull, the container of the first start, and what the daemon knew after it.
	before  int64
	running *started
	first   *profile.Profile
}

// pulls brings the image to all three variants. The disks cost nothing meanwhile: what pulls take is another benchmark's
// matter.
func (t *trial) pulls(ctx context.Context) error {
	if err := t.push(ctx, ref(t.img.Name), t.images[t.img.Name]); err != nil {
		return err
	}
	if err := t.sync(); err != nil {
		return err
	}
	before := map[string]int64{}
	for _, v := range variants {
		p := t.places[v]
		if p.nvm != nil {
			used, err := lab.UsedBytes(p.nvm.Mountpoint())
			if err != nil {
				return err
			}
			before[v] = used
		}
		if err := p.pull(ctx, ref(t.img.Name)); err != nil {
			return err
		}
	}
	if err := t.daemon.settled(ctx); err != nil {
		return err
	}
	var err error
	if t.row.Space.Pulled, err = t.grown(hybrid, before[hybrid]); err != nil {
		return err
	}
	if t.row.Space.AllNVM, err = t.grown(overlayNVM, before[overlayNVM]); err != nil {
		return err
	}
	t.row.Space.Fixed = before[hybrid] - t.nvmEmpty
	t.before = before[hybrid]
	return nil
}

// grown is by how much the used space of a variant's NVM has grown.
func (s *stand) grown(variant string, before int64) (int64, error) {
	if err := s.sync(); err != nil {
		return 0, err
	}
	used, err := lab.UsedBytes(s.places[variant].nvm.Mountpoint())
	return used - before, err
}

// cold starts a container with nothing in the caches.
func (b *bench) cold(ctx context.Context, s *stand, p *place, img catalog.Image, id string) (*started, error) {
	// The copy of the database is made after a change, such as what containerd collects of the container before, and might
	// else be made during this start.
	if err := p.collect(ctx); err != nil {
		return nil, err
	}
	if err := s.daemon.settled(ctx); err != nil {
		return nil, err
	}
	if err := s.sync(); err != nil {
		return nil, err
	}
	if err := lab.DropCaches(b.options.dropCaches); err != nil {
		return nil, err
	}
	return p.start(ctx, img, id, nil)
}

// warm starts a container with all in the caches that pulls have left there. Another benchmark on this machine may have emptied
// them.
func (b *bench) warm(ctx context.Context, _ *stand, p *place, img catalog.Image, id string) (*started, error) {
	packs, err := filepath.Glob(filepath.Join(p.disk.Mountpoint(), "nhybrid", "p", "*.erofs"))
	if err != nil {
		return nil, err
	}
	if share, err := lab.CachedShare(packs); err != nil || share < 0.9 {
		return nil, errors.Join(fmt.Errorf("%.0f %% of %d packs are cached after the pull: the caches are not warm", 100*share, len(packs)), err)
	}
	return p.start(ctx, img, id, nil)
}

// firstStarts leaves nhybrid's container running.
func (t *trial) firstStarts(ctx context.Context) error {
	if err := t.arm(); err != nil {
		return err
	}
	for _, v := range variants {
		c, err := t.cold(ctx, t.stand, t.places[v], t.img, "first-"+t.img.Name)
		if err != nil {
			return err
		}
		t.row.First[v] = c.start
		if v != hybrid {
			if err := c.remove(ctx); err != nil {
				return err
			}
			continue
		}
		t.running = c
		p, err := t.daemon.recorded(ctx, c, t.img.Name, 1)
		if err != nil {
			return err
		}
		t.first = p
		t.row.HotFiles = len(p.Files)
		t.row.HotBytes = profile.Bytes(p.Files)
	}
	return nil
}

// migration sends the cold files away from under the running container and compares what it sees then.
func (t *trial) migration(ctx context.Context) (err error) {
	if err := t.disarm(); err != nil {
		return err
	}
	if t.row.Migration, err = t.daemon.migrate(ctx); err != nil {
		return err
	}
	if t.row.Integrity, err = t.compare(ctx); err != nil {
		return err
	}
	if err := t.running.remove(ctx); err != nil {
		return err
	}
	if err := t.daemon.settled(ctx); err != nil {
		return err
	}
	// Blocks that the container held, and those of its writable layer, are free only now.
	if err := t.places[hybrid].collect(ctx); err != nil {
		return err
	}
	t.row.Space.Migrated, err = t.grown(hybrid, t.before)
	return err
}

// compare holds the image as nhybrid shows it against the layers as overlayfs does.
func (t *trial) compare(ctx context.Context) (_ *integrity, err error) {
	want, err := t.places[overlayNVM].view(ctx, t.img, t.stand.dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, want.close(ctx)) }()
	got, err := t.places[hybrid].view(ctx, t.img, t.stand.dir)
	if err != nil {
		return nil, err
	}
	// What was read here is no start.
	defer func() { err = errors.Join(err, t.daemon.ready(ctx, got.key), got.close(ctx)) }()
	return compare(ctx, want.dir, got.dir)
}

// secondStarts measures the variants in turn, each round in another order. overlayfs on HDD, which takes long and varies
// little, is measured in fewer rounds.
func (t *trial) secondStarts(ctx context.Context) error {
	if err := t.arm(); err != nil {
		return err
	}
	for round := range t.options.starts {
		order := []string{overlayNVM, hybrid}
		if round%2 == 1 {
			slices.Reverse(order)
		}
		if round < t.options.hddStarts {
			order = append(order, overlayHDD)
		}
		for _, v := range order {
			before := 0
			var err error
			if v == hybrid {
				if before, err = t.daemon.starts(ctx, t.img.Name); err != nil {
					return err
				}
			}
			c, err := t.cold(ctx, t.stand, t.places[v], t.img, fmt.Sprintf("second-%s-%d", t.img.Name, round))
			if err != nil {
				return err
			}
			t.row.Second[v] = append(t.row.Second[v], c.start)
			if v == hybrid {
				if _, err := t.daemon.recorded(ctx, c, t.img.Name, before+1); err != nil {
					return errors.Join(err, c.remove(ctx))
				}
			}
			if err := c.remove(ctx); err != nil {
				return err
			}
			if v != hybrid {
				continue
			}
			// What this start has changed is not to be measured with the next.
			if err := t.daemon.settled(ctx); err != nil {
				return err
			}
			if _, err := t.daemon.migrate(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// completeness compares one start under strace with its trace, and static analysis with what was opened.
func (t *trial) completeness(ctx context.Context) (err error) {
	if err := t.disarm(); err != nil {
		return err
	}
	v, err := t.places[overlayNVM].view(ctx, t.img, t.stand.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close(ctx)) }()
	files, err := v.list()
	if err != nil {
		return err
	}
	t.row.Files = len(files)
	for _, f := range files {
		t.row.Bytes += f.size
	}
	number, err := t.daemon.starts(ctx, t.img.Name)
	if err != nil {
		return err
	}
	log, c, err := t.places[hybrid].straced(ctx, t.img, "traced-"+t.img.Name, t.stand.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	p, err := t.daemon.recorded(ctx, c, t.img.Name, number+1)
	if err != nil {
		return err
	}
	used, err := v.used(log, files)
	if err != nil {
		return err
	}
	t.row.Trace = v.traceResult(used, files, p, t.first)
	t.row.Static, err = v.predict(ctx, files, used)
	return err
}

// traceResult holds the last start of a profile against what strace saw of it.
func (v *view) traceResult(used []string, files map[string]file, last, first *profile.Profile) (t traceResult) {
	// Starts that were not observed to the end have no number.
	t.Incomplete = last.Incomplete > 0
	traced, once := v.inodes(last, last.Starts), v.inodes(first, 0)
	t.Strace, t.Traced = len(used), len(traced)
	seen := map[uint64]bool{}
	for _, name := range used {
		seen[files[name].inode] = true
		if !traced[files[name].inode] {
			t.Missing = append(t.Missing, name)
		}
		if !once[files[name].inode] {
			t.FirstLacks++
		}
	}
	for inode := range traced {
		if !seen[inode] {
			t.Beyond++
		}
	}
	return t
}

// inodes are the files of a profile that were used in the start with the given number; 0: all.
func (v *view) inodes(p *profile.Profile, start int) map[uint64]bool {
	set := map[uint64]bool{}
	for _, f := range p.Files {
		if start == 0 || f.LastStart == start {
			set[v.inode(f.Layer, string(f.Path))] = true
		}
	}
	return set
}
