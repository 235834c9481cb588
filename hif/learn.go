// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/static"
)

// Prediction is how an image is analysed that has no profile.
type Prediction string

// The predictions.
const (
	PredictNothing Prediction = "off"
	PredictLayers  Prediction = "layers" // the N-Docker paper's: whole layers
	PredictFiles   Prediction = "files"
)

// Knowledge is how it is known what an image needs.
type Knowledge string

// The kinds of knowledge.
const (
	Traced    Knowledge = "traced"    // by starts on this node
	Inherited Knowledge = "inherited" // from another version of the image
	Pulled    Knowledge = "pulled"    // from the registry, or imported
	// Incomplete: by starts of which events were lost. What it does not name may be needed all the same.
	Incomplete Knowledge = "incomplete"
	Predicted  Knowledge = "predicted" // by static analysis
	Nothing    Knowledge = ""
)

// predictTimeout bounds an analysis; the largest of the images of docs/hif.md
// takes a second.
const predictTimeout = time.Minute

// Repository is the repository of a reference, without tag or digest; "" for
// what is no reference.
func Repository(ref string) string {
	r, err := name.ParseReference(ref)
	if err != nil {
		return ""
	}
	return r.Context().Name()
}

func registryOf(ref string) string {
	r, err := name.ParseReference(ref)
	if err != nil {
		return ""
	}
	return r.Context().RegistryStr()
}

// known returns what is known of an image, and how; a profile of rules alone
// is Nothing.
func (m *Manager) known(image digest.Digest) (profile.Profile, Knowledge, error) {
	p, err := m.book.Get(image)
	if err != nil && !errdefs.IsNotFound(err) {
		return p, Nothing, err
	}
	rules := p.Rules
	switch {
	case err == nil && len(p.Files) > 0 && m.origin(image) == Pulled:
		return p, Pulled, nil
	case err == nil && p.Complete():
		return p, Traced, nil
	case err == nil && p.Inherited != "":
		return p, Inherited, nil
	case err == nil && p.Incomplete > 0:
		return p, Incomplete, nil
	}
	q, err := m.predictions.Get(image)
	if errdefs.IsNotFound(err) {
		return p, Nothing, nil
	}
	if err != nil {
		return p, Nothing, err
	}
	q.Rules = rules
	return q, Predicted, nil
}

func (m *Manager) origin(image digest.Digest) Knowledge {
	k, err := m.origins.Get(image)
	if err != nil {
		log.L.WithError(err).Warn("cannot read where a profile comes from")
	}
	return Knowledge(k)
}

func (m *Manager) setOrigin(image digest.Digest, k Knowledge) error {
	return m.origins.Update(image, func([]byte) ([]byte, error) {
		if k == Nothing {
			return nil, nil
		}
		return []byte(k), nil
	})
}

// learner finds out what it can of images of which nothing is known yet, once
// for each image and run of the daemon, beside the loop: a registry may take its
// time. Guarded by Manager.mu, but for what only the one goroutine of learn uses.
type learner struct {
	busy     bool
	again    bool // asked to begin while busy: there may be images it has not seen
	swept    bool // the book was looked through since the daemon started
	asked    map[digest.Digest]bool
	nameless map[digest.Digest]int // how often they were waited for
}

func newLearner() learner {
	return learner{asked: map[digest.Digest]bool{}, nameless: map[digest.Digest]int{}}
}

// startLearning begins to learn of the images of the store, unless that is under way.
func (m *Manager) startLearning(images []Image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if m.learner.busy {
		m.learner.again = true
		return
	}
	m.learner.busy, m.learner.again = true, false
	m.wg.Go(func() {
		learned := m.learn(m.ctx, images)
		m.mu.Lock()
		if !learned && !m.learner.again {
			m.learner.busy = false
			m.mu.Unlock()
			return
		}
		m.mu.Unlock()
		m.kickAnd(func() { m.learner.busy = false })
	})
}

// learn tells whether anything was learned.
func (m *Manager) learn(ctx context.Context, images []Image) (learned bool) {
	l := &m.learner
	here := map[digest.Digest]bool{}
	for _, image := range images {
		here[image.Digest] = true
		if l.asked[image.Digest] || ctx.Err() != nil {
			continue
		}
		// A name may come a moment after the layers: containerd writes it last.
		if n := l.nameless[image.Digest]; !tagged(image.Name) && n < nameTries {
			l.nameless[image.Digest] = n + 1
			m.kickAfter(nameWait << n)
			continue
		}
		_, k, err := m.known(image.Digest)
		if err == nil && k == Nothing {
			k, err = m.learnImage(ctx, image)
			learned = learned || k != Nothing
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("image", image.Name).Warn("nothing could be learned of an image")
		}
		l.asked[image.Digest] = true
	}
	went := !l.swept
	for d := range l.asked {
		if !here[d] {
			went = true
			delete(l.asked, d)
			delete(l.nameless, d)
		}
	}
	if went {
		err := m.forget(here)
		if err != nil {
			log.G(ctx).WithError(err).Warn("profiles of images that are gone stay in the book")
		}
		l.swept = err == nil
	}
	return learned
}

// An image may be without a name for a while before it is looked at all the
// same: nameTries waits, of which each is twice as long as the one before.
const (
	nameWait  = 100 * time.Millisecond
	nameTries = 6
)

// learnImage asks the registry, then earlier versions, then the image itself.
func (m *Manager) learnImage(ctx context.Context, image Image) (Knowledge, error) {
	l := log.G(ctx).WithField("image", image.Name).WithField("digest", image.Digest)
	if a := m.ask(image.Name, image.Digest); a != nil {
		err := a.wait(ctx)
		if err == nil {
			_, err = m.accept(ctx, image, a.profile, m.book.PutNew)
		}
		m.early.forget(image.Digest)
		switch {
		case err == nil:
			l.Info("profile fetched from the registry")
			return Pulled, nil
		case errdefs.IsAlreadyExists(err):
			return Traced, nil // its first start was quicker
		case ctx.Err() != nil:
			return Nothing, ctx.Err()
		case !errdefs.IsNotFound(err):
			l.WithError(err).Info("no profile from the registry")
		}
	}
	if image.Repository != "" {
		switch old, err := m.book.Latest(image.Repository, image.Digest); {
		case err == nil:
			files, err := m.library.listing(ctx, image)
			if err != nil {
				return Nothing, err
			}
			if p := profile.Inherit(old, image.Image, files); len(p.Files) > 0 {
				l.WithField("from", old.Image).WithField("files", len(p.Files)).Info("profile inherited")
				if err := m.book.PutNew(p); !errdefs.IsAlreadyExists(err) {
					return Inherited, err
				}
				return Traced, nil // by a start meanwhile
			}
		case !errdefs.IsNotFound(err):
			return Nothing, err
		}
	}
	p, err := m.predict(ctx, image)
	if err != nil || len(p.Files) == 0 {
		return Nothing, err
	}
	l.WithField("files", len(p.Files)).Debug("profile predicted")
	return Predicted, m.predictions.Put(p)
}

// Fetch takes the profile of an image from its registry and puts it in the
// book. What the image does not have is left out and returned. plainHTTP: over
// HTTP, whatever the configuration says.
func (m *Manager) Fetch(ctx context.Context, image Image, plainHTTP bool) (Accepted, error) {
	p, artifact, err := m.registry(image.Name, plainHTTP).Pull(ctx, image.Name, image.Digest)
	if err != nil {
		return Accepted{}, err
	}
	accepted, err := m.accept(ctx, image, p, m.book.Put)
	accepted.Artifact = artifact
	return accepted, err
}

// registry says how the registry of a reference is reached.
func (m *Manager) registry(ref string, plainHTTP bool) profile.Registry {
	host := registryOf(ref)
	return profile.Registry{Via: m.config.Via, PlainHTTP: plainHTTP || host != "" && slices.Contains(m.config.PlainHTTP, host)}
}

// Accepted is a profile from outside as it was stored, and what of it was left out.
type Accepted struct {
	profile.Profile
	LeftOut  []profile.Problem
	Artifact digest.Digest // in the registry; "" for one that did not come from there
}

// Accept holds a profile from outside against its image and puts it in the
// book. Errors: those of [profile.Fit].
func (m *Manager) Accept(ctx context.Context, image Image, p profile.Profile) (Accepted, error) {
	return m.accept(ctx, image, p, m.book.Put)
}

func (m *Manager) accept(ctx context.Context, image Image, p profile.Profile, put func(profile.Profile) error) (Accepted, error) {
	files, err := m.library.listing(ctx, image)
	if err != nil {
		return Accepted{}, err
	}
	p, left, err := profile.Fit(p, image.Image, files)
	if err != nil {
		return Accepted{}, err
	}
	if err := put(p); err != nil {
		return Accepted{}, err
	}
	if err := m.setOrigin(image.Digest, Pulled); err != nil {
		return Accepted{}, err
	}
	m.forgetPrediction(image.Digest)
	m.Kick()
	return Accepted{Profile: p, LeftOut: left}, nil
}

// predict analyses an image.
func (m *Manager) predict(ctx context.Context, image Image) (profile.Profile, error) {
	p := profile.New(image.Image, time.Now())
	if m.config.Predict == PredictNothing || m.config.Predict == "" {
		return p, nil
	}
	config, err := m.store.Config(ctx, image)
	if err != nil {
		return p, err
	}
	files, err := m.library.listing(ctx, image)
	if err != nil {
		return p, err
	}
	add := func(e profile.Entry, k profile.Kind) {
		if len(p.Files) < profile.MaxFiles {
			p.Files = append(p.Files, profile.File{Path: e.Path, Layer: e.Layer, Size: e.Size, Kind: k, Weight: 1, Touched: -1})
		}
	}
	if m.config.Predict == PredictLayers {
		kinds := static.Layers(config.History, len(image.Layers))
		for e := range files.All {
			if kinds[e.Layer].Hot() {
				add(e, profile.Read)
			}
		}
		return p, p.Validate()
	}
	ctx, cancel := context.WithTimeout(ctx, predictTimeout)
	defer cancel()
	err = m.store.View(ctx, image, func(dir string) error {
		root, err := static.OpenDir(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		found, err := static.Analyze(ctx, root, config.Config, static.Options{})
		if errors.Is(err, static.ErrIncomplete) {
			log.G(ctx).WithError(err).WithField("image", image.Name).Debug("predicted in part")
			err = nil
		}
		seen := map[profile.Path]bool{}
		for _, f := range found {
			if e, ok := files.visible(f.Path); ok && !seen[e.Path] {
				seen[e.Path] = true
				add(e, kindOf(f.Reason))
			}
		}
		return err
	})
	if err != nil {
		return p, fmt.Errorf("analyse image %s: %w", image.Digest, err)
	}
	return p, p.Validate()
}

func kindOf(r static.Reason) profile.Kind {
	switch r {
	case static.Command, static.Interpreter:
		return profile.Exec
	case static.Library:
		return profile.Library
	}
	return profile.Read
}

// forgetPrediction drops what a real profile replaces.
func (m *Manager) forgetPrediction(image digest.Digest) {
	if err := m.predictions.Remove(image); err != nil && !errdefs.IsNotFound(err) {
		log.L.WithError(err).Warn("cannot drop a prediction")
	}
}
