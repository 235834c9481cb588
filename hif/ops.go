// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
)

// Known is what is known of an image.
type Known struct {
	Digest  digest.Digest
	How     Knowledge
	Profile profile.Profile
	Image   *Image // nil: not in the store
	// Hot are the files that belong on NVM; for an image that is not in the
	// store without those that are pinned only.
	Hot []profile.Hot
}

// Get returns what is known of an image; ErrNotFound if that is nothing.
func (m *Manager) Get(ctx context.Context, image digest.Digest) (Known, error) {
	p, how, err := m.known(image)
	if err != nil {
		return Known{}, err
	}
	if how == Nothing && len(p.Rules) == 0 {
		return Known{}, fmt.Errorf("no profile of image %s: %w", image, errdefs.ErrNotFound)
	}
	k := Known{Digest: image, How: how, Profile: p}
	found, err := m.Find(ctx, "", image)
	switch {
	case err == nil:
		k.Image = &found
		files := m.library.lazy(ctx, found)
		k.Hot = p.Hot(files)
		return k, files.err
	case errdefs.IsNotFound(err) || errdefs.IsUnavailable(err):
		k.Hot = p.Hot(&Listing{})
		return k, nil
	}
	return Known{}, err
}

// All calls yield for everything that is known, until it returns an error.
func (m *Manager) All(ctx context.Context, yield func(Known) error) error {
	var digests []digest.Digest
	seen := map[digest.Digest]bool{}
	for _, book := range []profile.Book{m.book, m.predictions} {
		err := book.Store.Each(func(d digest.Digest, _ []byte) error {
			if !seen[d] {
				seen[d] = true
				digests = append(digests, d)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, d := range digests {
		k, err := m.Get(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		if err := yield(k); err != nil {
			return err
		}
	}
	return nil
}

// Remove forgets what is known of an image. It is learned again by its next
// start; predicted it is at the next start of the daemon.
func (m *Manager) Remove(image digest.Digest) error {
	found := false
	for _, book := range []profile.Book{m.book, m.predictions} {
		err := book.Remove(image)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		found = found || err == nil
	}
	if !found {
		return fmt.Errorf("no profile of image %s: %w", image, errdefs.ErrNotFound)
	}
	m.Kick()
	return m.setOrigin(image, Nothing)
}

// SetRule adds a rule of the operator to the profile of an image. It returns
// all rules and the files that this one matches.
func (m *Manager) SetRule(ctx context.Context, image Image, r profile.Rule) (rules []profile.Rule, matched []profile.Entry, err error) {
	files, err := m.library.listing(ctx, image)
	if err != nil {
		return nil, nil, err
	}
	p, err := m.book.SetRule(image.Image, r, files, time.Now())
	if err != nil {
		return nil, nil, err
	}
	one := profile.Profile{Rules: []profile.Rule{{Glob: r.Glob, Action: profile.Pin}}}
	for e := range files.All {
		if one.Action(e.Path) == profile.Pin {
			matched = append(matched, e)
		}
	}
	m.Kick()
	return p.Rules, matched, nil
}

// Push stores the profile of an image in its registry. A prediction is refused
// with ErrFailedPrecondition: every node can make it itself.
func (m *Manager) Push(ctx context.Context, image Image, plainHTTP bool) (digest.Digest, error) {
	p, how, err := m.known(image.Digest)
	switch {
	case err != nil:
		return "", err
	case how == Predicted:
		return "", fmt.Errorf("image %s was never started here, there is only a prediction, which every node makes itself; start it once: %w",
			image.name(), errdefs.ErrFailedPrecondition)
	case how == Nothing:
		return "", fmt.Errorf("no profile of image %s: %w", image.name(), errdefs.ErrNotFound)
	case image.Name == "":
		return "", fmt.Errorf("image %s has no name that would tell its registry: %w", image.Digest, errdefs.ErrFailedPrecondition)
	}
	return m.registry(image.Name, plainHTTP).Push(ctx, image.Name, p)
}

// Files calls yield for each name of a file of an image with its place in the profile.
func (m *Manager) Files(ctx context.Context, image Image, yield func(f File, hot *profile.Hot) error) error {
	p, _, err := m.known(image.Digest)
	if err != nil {
		return err
	}
	all, err := m.library.hot(ctx, image, &p)
	if err != nil {
		return err
	}
	hot := map[string]*profile.Hot{}
	for _, h := range all {
		hot[h.Redirect] = &h.Hot
	}
	var stop error
	err = m.store.Files(ctx, image, func(f File) bool {
		stop = yield(f, hot[f.Redirect])
		return stop == nil
	})
	return errors.Join(err, stop)
}

// Stats of the tracer, and why there is none.
func (m *Manager) Stats() (trace.Stats, error) {
	if m.tracer == nil {
		return trace.Stats{}, m.traceErr
	}
	return m.tracer.Stats(), nil
}

// Recorded is how many starts were recorded since the manager began, and how
// many of them lost events.
func (m *Manager) Recorded() (starts, incomplete int64) {
	return m.counters.recorded.Load(), m.counters.incomplete.Load()
}

// ErrNoMigration is what there is to say where [Manager.Engine] is nil.
var ErrNoMigration = fmt.Errorf("files are not moved, by the configuration (hot.migrate): %w", errdefs.ErrFailedPrecondition)

// Engine moves the files; nil if they are not moved.
func (m *Manager) Engine() *migrate.Engine { return m.engine }

// Pause stops all migration until it is resumed, also one without limits.
func (m *Manager) Pause() error {
	if m.engine == nil {
		return ErrNoMigration
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hurry = false // else the next plan would resume it
	m.engine.Pause()
	return nil
}

// MigrateNow makes a plan and has it carried out without limits.
func (m *Manager) MigrateNow(ctx context.Context) error {
	if m.engine == nil {
		return ErrNoMigration
	}
	if m.engine.Progress().State == migrate.Paused {
		return fmt.Errorf("migration is paused; resume it first: %w", errdefs.ErrFailedPrecondition)
	}
	m.mu.Lock()
	m.hurry = true
	m.kicks++ // with the lock, or the loop would find nothing left to do and end the hurry before it began
	m.undivided = map[string]undivided{}
	m.mu.Unlock()
	if m.engine.Progress().Pinned > 0 {
		m.store.LetGo(ctx)
	}
	return m.settle(ctx)
}
