// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/profile"
)

// Arriving is an image that is being pulled: none of its layers need be here yet.
type Arriving struct {
	profile.Image        // Layers are the digests of the uncompressed layers, as the image's config lists them
	Name          string // reference, "" if it is not known
}

// HotSet tells of the files of an image that is being pulled which are hot. It
// does not change, and may be used by several goroutines.
type HotSet struct {
	// How it is known. [Nothing]: no file is hot but those that the operator has
	// pinned, and of a file that is not hot nobody knows whether it is cold.
	How Knowledge

	layers  []digest.Digest // of the image
	from    profile.Profile // of the image, or of an earlier version
	byPath  map[profile.Path]int
	version bool // from is of an earlier version
}

// Settled tells whether files that are not hot are cold.
func (h *HotSet) Settled() bool { return h.How.settled() }

// Hot returns what is known of an image that is being pulled: from the book, from
// its registry, which is asked if it has not been, or from an earlier version of
// its repository. It waits for the registry no longer than ctx allows, and
// returns what is known then; a later call may know more.
func (m *Manager) Hot(ctx context.Context, image Arriving) HotSet {
	h := HotSet{layers: image.Layers}
	l := log.G(ctx).WithField("image", image.Name).WithField("digest", image.Digest)
	p, how, err := m.known(image.Digest)
	if err != nil {
		l.WithError(err).Warn("the profile of an image that is pulled cannot be read")
		return h
	}
	rules := p.Rules
	if how == Nothing {
		if a := m.ask(image.Name, image.Digest); a != nil {
			if err := a.wait(ctx); err != nil {
				l.WithError(err).Debug("no profile from the registry while the image is pulled")
			} else if a.profile.Image == image.Digest && slices.Equal(a.profile.Layers, image.Layers) {
				p, how = a.profile, Pulled
			}
		}
	}
	if how == Nothing && image.Repository != "" {
		switch old, err := m.book.Latest(image.Repository, image.Digest); {
		case err == nil:
			p, how, h.version = old, Inherited, true
			if rules == nil {
				rules = old.Rules
			}
		case !errdefs.IsNotFound(err):
			l.WithError(err).Warn("no profile of an earlier version can be read")
		}
	}
	p.Rules = rules
	h.fill(how, p)
	return h
}

// fill sets what is known.
func (h *HotSet) fill(how Knowledge, p profile.Profile) {
	h.How, h.from, h.byPath = how, p, make(map[profile.Path]int, len(p.Files))
	for i, f := range p.Files {
		h.byPath[f.Path] = i
	}
}

// File tells whether a regular file of a layer, which may be hidden by a layer
// above, is hot, and why, in one sentence. Layers count from the lowest, 0; the
// path is the first of the file in the layer, without a "/" at its beginning.
func (h *HotSet) File(layer int, path string) (hot bool, why string) {
	p := profile.Path(path)
	if layer < 0 || layer >= len(h.layers) {
		return false, "the image has no such layer"
	}
	switch h.from.Action(p) {
	case profile.Pin:
		return true, "it is pinned"
	case profile.Exclude:
		return false, "a rule excludes it"
	}
	i, ok := h.byPath[p]
	if !ok || !h.holds(layer, h.from.Files[i].Layer) {
		if h.Settled() {
			return false, "no start has used it"
		}
		return false, "it is not known to be used"
	}
	f := h.from.Files[i]
	switch h.How {
	case Predicted:
		return true, "a start will need it, says the analysis of the image"
	case Inherited:
		return true, fmt.Sprintf("%.0f %% of the starts of an earlier version used it", 100*f.Weight)
	case Pulled:
		return true, fmt.Sprintf("%.0f %% of the starts use it, says the profile from the registry", 100*f.Weight)
	}
	return true, fmt.Sprintf("%.0f %% of the starts use it", 100*f.Weight)
}

// holds tells whether a file that the profile has in one of its layers is, for
// all that is known, the one at the same path in a layer of the image.
//
// A layer that the version of the profile has, too, is the file's own, or its file
// at that path was hidden then. One that is new may have a new version of the file;
// below the layer with the old one, if the image has that, it would be hidden.
func (h *HotSet) holds(layer, in int) bool {
	if in < 0 || in >= len(h.from.Layers) {
		return false
	}
	own := h.from.Layers[in]
	switch {
	case h.layers[layer] == own:
		return true
	case !h.version || slices.Contains(h.from.Layers, h.layers[layer]):
		return false
	}
	return slices.Index(h.layers, own) < layer // -1: it is gone
}
