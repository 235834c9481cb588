// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Heat is what is known of one data file, and what the latest plan does with it.
type Heat struct {
	Hot bool
	Why string // why it is hot or not, as a clause; "" if the image is not known to containerd
	// Other is the image that the file is hot for, if it is not hot for the one that was asked about.
	Other string
	Parts bool // only the parts of it that starts touch may belong on NVM

	Settled bool     // only hot files of its layer stay on NVM
	Moves   bool     // files are moved: the plan is carried out
	Comes   bool     // the plan brings it to NVM
	Leaves  string   // why the plan takes it off NVM, as a clause; "" if it does not
	Denied  plan.Sum // hot files that find no room on NVM
}

// Heat tells of a data file of the image with the given digest and view; the digest "" stands for any image of the view. A file that is not
// hot for that image may be hot for another one with the same layer.
func (m *Manager) Heat(ctx context.Context, image digest.Digest, view string, ref pack.Ref) (Heat, error) {
	redirect := ref.Redirect()
	layer := layerOf(redirect)
	o := m.Overview()
	h := Heat{
		Settled: o.SettledLayers[layer], Moves: m.engine != nil, Comes: o.Plan.Comes(redirect), Leaves: o.Plan.Leaves(layer, redirect), Denied: o.Plan.Denied,
	}
	images, err := m.store.Images(ctx)
	if err != nil {
		return Heat{}, fmt.Errorf("list images: %w", err)
	}
	var asked, others []Image
	for _, i := range images {
		switch {
		case !slices.Contains(i.Chain, layer):
		case i.View == view && (image == "" || i.Digest == image):
			asked = append(asked, i)
		default:
			others = append(others, i)
		}
	}
	for n, i := range append(asked, others...) {
		hot, err := m.heatFor(ctx, i, ref)
		if err != nil && n >= len(asked) && ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("an image is left out of why a file is hot")
			continue
		}
		if err != nil {
			return Heat{}, err
		}
		if hot.Hot || n == 0 && len(asked) > 0 {
			h.Hot, h.Why, h.Parts = hot.Hot, hot.Why, hot.Parts
		}
		if hot.Hot {
			if n >= len(asked) {
				h.Other = i.name()
			}
			break
		}
	}
	return h, nil
}

// heatFor sets Hot, Why and Parts of a data file by what is known of one image that has its layer.
func (m *Manager) heatFor(ctx context.Context, image Image, ref pack.Ref) (Heat, error) {
	p, how, err := m.known(image.Digest)
	if err != nil {
		return Heat{}, fmt.Errorf("read the profile of image %s: %w", image.name(), err)
	}
	files, err := m.library.find(ctx, image, []pack.Ref{ref})
	if err != nil {
		return Heat{}, err
	}
	file, ok := files[ref]
	if !ok { // a layer above hides it
		return Heat{}, nil
	}
	set := HotSet{layers: image.Layers}
	set.fill(how, p)
	var h Heat
	h.Hot, h.Why = set.File(file.Layer, string(file.Path))
	if i, ok := set.byPath[file.Path]; ok && h.Hot && how.settled() {
		h.Parts = m.divides(profile.Hot{File: p.Files[i], Pinned: p.Action(file.Path) == profile.Pin})
	}
	return h, nil
}
