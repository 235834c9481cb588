// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
)

// Other circumstances of a first start than those of the images part, which is cold and has the read-ahead that doctor advises.
const (
	savedWarm      = "warm"              // right after the pull, with all in the caches
	savedReadAhead = "default_readahead" // cold, and the kernel reads on NVM as far ahead as it does by default
)

var circumstances = []string{savedWarm, savedReadAhead}

// savedRow is what an image takes of NVM after a first start, by its circumstances.
type savedRow struct {
	Image string           `json:"image"`
	Space map[string]space `json:"space"`
}

func (b *bench) saved(ctx context.Context, img catalog.Image) (*savedRow, error) {
	r := &savedRow{Image: img.Name, Space: map[string]space{}}
	for _, c := range circumstances {
		var err error
		if r.Space[c], err = b.savedWhen(ctx, img, c); err != nil {
			return nil, fmt.Errorf("%s: %w", c, err)
		}
	}
	return r, nil
}

func (b *bench) savedWhen(ctx context.Context, img catalog.Image, when string) (sp space, err error) {
	s, err := b.newStand(ctx, setup{size: b.deviceSize, overlay: true, config: patient})
	if err != nil {
		return sp, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, when+"-"+img.Name)
		err = errors.Join(err, s.Close())
	}()
	own := s.places[hybrid]
	begin := b.cold
	if when == savedWarm {
		begin = b.warm
	} else if err := block.SetReadAhead(own.nvm.Mountpoint(), block.ReadAheadKiB); err != nil {
		return sp, err
	}
	if err := s.push(ctx, ref(img.Name), b.images[img.Name]); err != nil {
		return sp, err
	}
	// nhybrid's pull is the last thing before its start.
	for _, p := range []struct {
		variant string
		grown   *int64
	}{{overlayNVM, &sp.AllNVM}, {hybrid, &sp.Migrated}} {
		before, err := s.grown(p.variant, 0)
		if err != nil {
			return sp, err
		}
		if err := s.places[p.variant].pull(ctx, ref(img.Name)); err != nil {
			return sp, err
		}
		if p.variant == hybrid {
			if err := s.firstStart(ctx, img, begin); err != nil {
				return sp, err
			}
		}
		if *p.grown, err = s.grown(p.variant, before); err != nil {
			return sp, err
		}
	}
	return sp, nil
}

// firstStart starts nhybrid's container, brings the tiers to what was learned, and removes the container.
func (s *stand) firstStart(ctx context.Context, img catalog.Image, begin func(context.Context, *stand, *place, catalog.Image, string) (*started, error)) error {
	own := s.places[hybrid]
	c, err := begin(ctx, s, own, img, "only-"+img.Name)
	if err != nil {
		return err
	}
	if _, err := s.daemon.recorded(ctx, c, img.Name, 1); err != nil {
		return errors.Join(err, c.remove(ctx))
	}
	if err := c.remove(ctx); err != nil {
		return err
	}
	if err := own.collect(ctx); err != nil {
		return err
	}
	if err := s.daemon.settled(ctx); err != nil {
		return err
	}
	_, err = s.daemon.migrate(ctx)
	return err
}

// savedFigures are means over the images.
func (rs rows) savedFigures(set func(string, float64)) {
	for _, c := range circumstances {
		var saved []float64
		for _, r := range rs {
			if r.Saved != nil {
				saved = append(saved, r.Saved.Space[c].saved())
			}
		}
		set("nvm_saved_mean_"+c, result.Mean(saved))
		set("nvm_saved_min_"+c, least(saved))
	}
}

func (rs rows) savedTable() result.Table {
	t := result.Table{
		Title: "NVM in use after other first starts, MB",
		Head:  []string{"image", "everything on NVM", "right after the pull", "saved", "cold, NVM with the kernel's read-ahead", "saved"},
	}
	for _, r := range rs {
		if r.Saved == nil {
			continue
		}
		w, d := r.Saved.Space[savedWarm], r.Saved.Space[savedReadAhead]
		t.Rows = append(t.Rows, []string{r.Saved.Image, mb(w.AllNVM), mb(w.Migrated), percent(w.saved()), mb(d.Migrated), percent(d.saved())})
	}
	return t
}
