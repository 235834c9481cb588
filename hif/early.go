// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/profile"
)

const (
	// fetchTimeout bounds the question for a profile to a registry.
	fetchTimeout = 10 * time.Second
	// silence is how long a registry that could not be reached is left alone, and
	// how long the answer for an image is kept that does not come to be.
	silence = 10 * time.Minute
)

// earlyProfiles are questions to registries for profiles. They are asked when the
// pull of an image begins, so that the answer is there when files arrive, or else
// once it is whole.
type earlyProfiles struct {
	mu     sync.Mutex
	asked  map[digest.Digest]*answer
	silent map[string]time.Time // registries that gave no answer, and when
	failed map[string]error     // of the latest question to each registry that was not answered
}

func newEarlyProfiles() *earlyProfiles {
	return &earlyProfiles{asked: map[digest.Digest]*answer{}, silent: map[string]time.Time{}, failed: map[string]error{}}
}

// answer of a registry. profile and err may be read once done is closed.
type answer struct {
	at      time.Time
	done    chan struct{}
	profile profile.Profile // not held against the image yet
	err     error
}

// wait returns when the answer is there, and how it failed.
func (a *answer) wait(ctx context.Context) error {
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask asks the registry of an image for its profile, unless that was done. It
// returns nil if the configuration does not want it, the name tells no registry,
// or that has been silent of late.
func (m *Manager) ask(ref string, image digest.Digest) *answer {
	if !m.config.Fetch || !tagged(ref) {
		return nil
	}
	e, host := m.early, registryOf(ref)
	e.mu.Lock()
	defer e.mu.Unlock()
	if a := e.asked[image]; a != nil {
		return a
	}
	maps.DeleteFunc(e.asked, func(_ digest.Digest, a *answer) bool { return time.Since(a.at) > silence })
	m.mu.Lock()
	defer m.mu.Unlock()
	if host == "" || time.Since(e.silent[host]) < silence || m.closed {
		return nil
	}
	a := &answer{at: time.Now(), done: make(chan struct{})}
	e.asked[image] = a
	m.wg.Go(func() {
		defer close(a.done)
		ctx, cancel := context.WithTimeout(m.ctx, fetchTimeout)
		defer cancel()
		a.profile, _, a.err = m.registry(ref, false).Pull(ctx, ref, image)
		if m.ctx.Err() != nil {
			return
		}
		e.mu.Lock()
		delete(e.failed, host)
		if a.err != nil && !errdefs.IsNotFound(a.err) {
			e.failed[host] = a.err
		}
		e.mu.Unlock()
		var said *transport.Error
		if a.err == nil || errdefs.IsNotFound(a.err) || errors.As(a.err, &said) {
			return
		}
		log.L.WithError(a.err).WithField("image", ref).Infof("no profile from the registry; it is not asked again for %s", silence)
		e.mu.Lock()
		e.silent[host] = time.Now()
		e.mu.Unlock()
	})
	return a
}

// Unanswered tells which registries did not answer the latest question for a profile of an image that was pulled, and why.
func (m *Manager) Unanswered() map[string]error {
	m.early.mu.Lock()
	defer m.early.mu.Unlock()
	return maps.Clone(m.early.failed)
}

// forget drops the answer for an image.
func (e *earlyProfiles) forget(image digest.Digest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.asked, image)
}

// tagged tells whether a name is a reference of containerd's image store; one by
// digest is made up of where its content came from.
func tagged(name string) bool { return name != "" && !strings.Contains(name, "@") }
