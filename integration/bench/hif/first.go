// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// What is known of an image before its first start.
const (
	knowsNothing = "nothing"
	knowsLayers  = "layers"
	knowsFiles   = "files"
	knowsProfile = "profile"
)

var knowledge = []string{knowsNothing, knowsLayers, knowsFiles, knowsProfile}

// firstRow is first cold starts of an image, by what was known of it.
type firstRow struct {
	Image string                `json:"image"`
	Modes map[string]*firstMode `json:"modes"`
	// Link is what the link really let through, measured before the first pull.
	Link lab.LinkRate `json:"link"`
}

type firstMode struct {
	Start start `json:"start"`
	// AllNVM is the cold start beside it with everything on NVM.
	AllNVM start `json:"all_nvm"`
	// NVMBytes is by how much pull and preparation have filled NVM, AllNVMBytes the same with everything there.
	NVMBytes    int64 `json:"nvm_bytes"`
	AllNVMBytes int64 `json:"all_nvm_bytes"`
	// Prepared is what was moved before the start.
	Prepared migration `json:"prepared"`
}

// first pulls an image anew for each kind of knowledge, through a link that is slow enough for its lower layers to be
// stored while others still come, and starts it once what is known has had its effect.
func (b *bench) first(ctx context.Context, img catalog.Image) (*firstRow, error) {
	r := &firstRow{Image: img.Name, Modes: map[string]*firstMode{}}
	artifacts, err := os.MkdirTemp(b.dir, "profile-")
	if err != nil {
		return nil, err
	}
	rate, err := placement.ParseRate(b.options.link)
	if err != nil {
		return nil, err
	}
	if r.Link, err = b.measureLink(ctx, img, rate); err != nil {
		return nil, err
	}
	for _, mode := range knowledge {
		if r.Modes[mode], err = b.firstWith(ctx, img, mode, rate, artifacts); err != nil {
			return nil, fmt.Errorf("with %s: %w", mode, err)
		}
	}
	return r, os.RemoveAll(artifacts)
}

func firstConfig(mode string) string {
	predict := "off"
	if mode == knowsFiles || mode == knowsLayers {
		predict = mode
	}
	return fmt.Sprintf("[placement]\npolicy = 'lass'\n[hot]\npredict = '%s'\nfetch_profiles = %t\n", predict, mode == knowsProfile)
}

// measureLink is done with a stand of its own, so that no fetch of its warms anything for the pulls.
func (b *bench) measureLink(ctx context.Context, img catalog.Image, rate float64) (r lab.LinkRate, err error) {
	m, err := b.images[img.Name].Manifest()
	if err != nil {
		return r, err
	}
	s, err := b.newStand(ctx, setup{size: b.deviceSize, rate: rate})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.push(ctx, ref(img.Name), b.images[img.Name]); err != nil {
		return r, err
	}
	return lab.MeasureLink(ctx, s.places[hybrid].rig, ref(img.Name), m.Layers, rate)
}

func (b *bench) firstWith(ctx context.Context, img catalog.Image, mode string, rate float64, artifacts string) (m *firstMode, err error) {
	s, err := b.newStand(ctx, setup{size: b.deviceSize, overlay: true, rate: rate, config: firstConfig(mode)})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, "first-"+img.Name+"-"+mode)
		err = errors.Join(err, s.Close())
	}()
	m = &firstMode{}
	own, all := s.places[hybrid], s.places[overlayNVM]
	if err := s.push(ctx, ref(img.Name), b.images[img.Name]); err != nil {
		return nil, err
	}
	if mode == knowsProfile {
		if err := putArtifact(ctx, own.rig, img.Name, artifacts); err != nil {
			return nil, err
		}
	}
	for _, p := range []struct {
		*place
		grown *int64
	}{{own, &m.NVMBytes}, {all, &m.AllNVMBytes}} {
		before, err := s.grown(p.variant, 0)
		if err != nil {
			return nil, err
		}
		if err := p.pull(ctx, ref(img.Name)); err != nil {
			return nil, err
		}
		if p.variant == hybrid {
			if err := s.daemon.settled(ctx); err != nil {
				return nil, err
			}
			if mode == knowsProfile {
				if err := await(ctx, func(ctx context.Context) error { return s.daemon.knows(ctx, img.Name) }); err != nil {
					return nil, err
				}
			}
			if m.Prepared, err = s.daemon.migrate(ctx); err != nil {
				return nil, err
			}
		}
		if *p.grown, err = s.grown(p.variant, before); err != nil {
			return nil, err
		}
	}
	if err := s.arm(); err != nil {
		return nil, err
	}
	c, err := b.cold(ctx, s, all, img, "all-"+img.Name)
	if err != nil {
		return nil, err
	}
	m.AllNVM = c.start
	if err := c.remove(ctx); err != nil {
		return nil, err
	}
	if c, err = b.cold(ctx, s, own, img, "own-"+img.Name); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	m.Start = c.start
	if mode != knowsNothing {
		return m, nil
	}
	if _, err := s.daemon.recorded(ctx, c, img.Name, 1); err != nil {
		return nil, err
	}
	return m, takeArtifact(ctx, s.daemon, img.Name, artifacts)
}

// knows says if the daemon has a profile of an image that was never started here.
func (d *daemon) knows(ctx context.Context, image string) error {
	p, err := d.profile(ctx, image)
	if err == nil && (p == nil || len(p.Files) == 0) {
		err = fmt.Errorf("the daemon has no profile of image %s", image)
	}
	return err
}

// takeArtifact lets the daemon push the profile beside its image and copies the artifact from the registry, which goes
// with its rig.
func takeArtifact(ctx context.Context, d *daemon, image, dir string) error {
	answer, err := d.client.PushProfile(ctx, &control.RegistryRequest{Image: d.rig.Ref(ref(image)), Namespace: d.rig.Namespace, PlainHttp: true})
	if err != nil {
		return fmt.Errorf("push the profile of image %s: %w", image, err)
	}
	repo, err := repository(d.rig, image)
	if err != nil {
		return err
	}
	artifact, err := remote.Image(repo.Digest(answer.GetDigest()), remote.WithContext(ctx))
	if err != nil {
		return err
	}
	index, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return index.AppendImage(artifact)
}

// putArtifact stores the copy in the registry of another rig.
func putArtifact(ctx context.Context, g *rig.Rig, image, dir string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	repo, err := repository(g, image)
	if err != nil {
		return err
	}
	for _, d := range m.Manifests {
		artifact, err := index.Image(d.Digest)
		if err != nil {
			return err
		}
		if err := remote.Write(repo.Digest(d.Digest.String()), artifact, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("store the profile of image %s: %w", image, err)
		}
	}
	if len(m.Manifests) == 0 {
		return fmt.Errorf("no profile of image %s in %s (%s)", image, filepath.Base(dir), profile.MediaType)
	}
	return nil
}

func repository(g *rig.Rig, image string) (name.Repository, error) {
	r, err := name.ParseReference(g.Registry.Addr()+"/"+ref(image), name.Insecure)
	if err != nil {
		return name.Repository{}, err
	}
	return r.Context(), nil
}
