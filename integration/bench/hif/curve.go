// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
)

// curveRow is how full NVM was while an image was pulled, started, migrated and started again.
type curveRow struct {
	Image  string `json:"image"`
	Hybrid curve  `json:"nhybrid"`
	AllNVM curve  `json:"all_nvm"`
}

// curve is one variant's.
type curve struct {
	Samples []sample `json:"samples"`
	Marks   []mark   `json:"marks"`
}

type sample struct {
	S     float64 `json:"s"`
	Bytes int64   `json:"bytes"` // above what the filesystem took before the pull
}

// mark is when something began.
type mark struct {
	S    float64 `json:"s"`
	What string  `json:"what"`
}

const (
	sampleEvery = 50 * time.Millisecond
	restFor     = time.Second // between two steps, for the eye
	curveLink   = 125e6       // bytes a second: 1 Gbit/s
)

func (b *bench) curve(ctx context.Context, img catalog.Image) (*curveRow, error) {
	own, err := b.curveOf(ctx, img, hybrid)
	if err != nil {
		return nil, err
	}
	all, err := b.curveOf(ctx, img, overlayNVM)
	if err != nil {
		return nil, err
	}
	return &curveRow{img.Name, *own, *all}, nil
}

// curveOf has a stand of its own, for a second pull into the same containerd would download nothing.
func (b *bench) curveOf(ctx context.Context, img catalog.Image, variant string) (c *curve, err error) {
	s, err := b.newStand(ctx, setup{size: b.deviceSize, overlay: true, rate: curveLink})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, "curve-"+variant)
		err = errors.Join(err, s.Close())
	}()
	if err := s.push(ctx, ref(img.Name), b.images[img.Name]); err != nil {
		return nil, err
	}
	if err := s.arm(); err != nil {
		return nil, err
	}
	p := s.places[variant]
	dir := p.nvm.Mountpoint()
	base, err := lab.UsedBytes(dir)
	if err != nil {
		return nil, err
	}
	c = &curve{}
	begun := time.Now()
	sampling, stop := context.WithCancel(ctx)
	sampled := make(chan error, 1)
	go func() { sampled <- c.watch(sampling, dir, base, begun) }()
	err = b.lifeOf(ctx, s, p, img, func(what string) { c.Marks = append(c.Marks, mark{time.Since(begun).Seconds(), what}) })
	stop()
	return c, errors.Join(err, <-sampled)
}

// watch samples until the context ends.
func (c *curve) watch(ctx context.Context, dir string, base int64, begun time.Time) error {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		used, err := lab.UsedBytes(dir)
		if err != nil {
			return err
		}
		now := sample{time.Since(begun).Seconds(), used - base}
		if n := len(c.Samples); n >= 2 && c.Samples[n-1].Bytes == now.Bytes && c.Samples[n-2].Bytes == now.Bytes {
			c.Samples[n-1] = now // a level needs its two ends
		} else {
			c.Samples = append(c.Samples, now)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// lifeOf is what happens to the image.
func (b *bench) lifeOf(ctx context.Context, s *stand, p *place, img catalog.Image, mark func(string)) error {
	rest := func() error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(restFor):
			return s.sync()
		}
	}
	mark("pull")
	if err := p.pull(ctx, ref(img.Name)); err != nil {
		return err
	}
	if err := s.daemon.settled(ctx); err != nil {
		return err
	}
	if err := rest(); err != nil {
		return err
	}
	for i, what := range []string{"first start", "second start"} {
		mark(what)
		c, err := b.cold(ctx, s, p, img, fmt.Sprintf("curve-%d", i))
		if err != nil {
			return err
		}
		if p.variant == hybrid {
			_, err = s.daemon.recorded(ctx, c, img.Name, i+1)
		}
		err = errors.Join(err, rest())
		if err == nil && p.variant == hybrid && i == 0 {
			mark("migration")
			_, err = s.daemon.migrate(ctx)
			err = errors.Join(err, rest())
		}
		mark("container removed")
		if err = errors.Join(err, c.remove(ctx)); err != nil {
			return err
		}
		if err := s.daemon.settled(ctx); err != nil {
			return err
		}
		if err := rest(); err != nil {
			return err
		}
	}
	return nil
}

// draw writes the picture, if a curve was measured.
func (b *bench) draw(all []row) error {
	for _, r := range all {
		if r.Curve == nil {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(b.options.svg), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(b.options.svg, picture(r.Curve), 0o644); err != nil {
			return err
		}
		b.say("wrote %s", b.options.svg)
	}
	return nil
}
