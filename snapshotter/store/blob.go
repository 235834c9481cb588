// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// open opens a blob as it grows, or, where its file cannot be read from here,
// when it has arrived. Its place is another's while it waits.
func (s *Store) open(ctx context.Context, l *layer, spec Spec, place *place) (io.ReadCloser, error) {
	if root := s.config.Blobs.ContentRoot(ctx); root != "" && !s.elsewhere(ctx, root, l, spec) {
		r, err := unpack.OpenGrowing(ctx, root, spec.Blob, spec.Size, place.without)
		if err == nil {
			return s.guard(ctx, r, root, l, spec), nil
		}
		if ctx.Err() != nil || !errdefs.IsUnavailable(err) {
			return nil, err
		}
		log.G(ctx).WithError(err).Debug("a blob is read by containerd's API, when it is whole")
	}
	arrived, cancel := s.config.Blobs.Subscribe("") // pulls of other namespaces may join
	defer cancel()
	for {
		r, err := s.fromProvider(ctx, l, spec)
		if err == nil || !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
			return r, err
		}
		err = place.without(ctx, func() error {
			select {
			case <-arrived:
			case <-time.After(time.Second): // events may be lost with the connection
			case <-ctx.Done():
			}
			return ctx.Err()
		})
		if err != nil {
			return nil, err
		}
	}
}

// place is one of those that bound how many layers are unpacked at a time. An unpacking has it while it computes, and not
// while it waits for its download: one that stands still must not keep the layers of others from being unpacked. One
// goroutine uses it at a time: the one that reads the blob, and when that has ended the one that has begun it.
type place struct {
	of      chan struct{}
	taken   bool
	mayWait func() error // asked before each wait; its error forbids it
}

// take waits for a place, or for the end of ctx.
func (p *place) take(ctx context.Context) error {
	select {
	case p.of <- struct{}{}:
		p.taken = true
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leave gives the place back if it is taken.
func (p *place) leave() {
	if p.taken {
		p.taken = false
		<-p.of
	}
}

// without gives the place back while wait runs.
func (p *place) without(ctx context.Context, wait func() error) error {
	if err := p.mayWait(); err != nil {
		return err
	}
	p.leave()
	if err := wait(); err != nil {
		return err
	}
	return p.take(ctx)
}

// fromProvider opens a blob that is whole in the content store, in whichever namespace somebody wants it.
func (s *Store) fromProvider(ctx context.Context, l *layer, spec Spec) (r io.ReadCloser, err error) {
	s.mu.Lock()
	spaces := slices.Clone(l.spaces)
	s.mu.Unlock()
	if len(spaces) == 0 {
		spaces = []string{spec.Namespace}
	}
	for _, ns := range spaces {
		var provider content.Provider
		if provider, err = s.config.Blobs.Provider(ctx, ns); err != nil {
			return nil, err
		}
		r, err = unpack.FromProvider(ctx, provider, descriptor(Layer{Blob: spec.Blob, Size: spec.Size, MediaType: spec.MediaType}))
		if !errdefs.IsNotFound(err) {
			break
		}
	}
	return r, err
}

// elsewhere reports whether containerd has a blob that is not below the content
// root as it is seen from here: containerd lives in another mount namespace, or
// its content store is a plugin of somebody's.
func (s *Store) elsewhere(ctx context.Context, root string, l *layer, spec Spec) bool {
	if _, err := os.Lstat(filepath.Join(root, "blobs", spec.Blob.Algorithm().String(), spec.Blob.Encoded())); err == nil {
		return false
	}
	r, err := s.fromProvider(ctx, l, spec)
	if err != nil {
		return false
	}
	r.Close()
	// It may have arrived between the two looks.
	_, err = os.Lstat(filepath.Join(root, "blobs", spec.Blob.Algorithm().String(), spec.Blob.Encoded()))
	return errors.Is(err, os.ErrNotExist)
}

// guard ends a reader that waits below a directory to which its blob will never come.
func (s *Store) guard(ctx context.Context, r io.ReadCloser, root string, l *layer, spec Spec) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	g := &guarded{ReadCloser: r, cancel: cancel}
	arrived, unsubscribe := s.config.Blobs.Subscribe("")
	s.wg.Go(func() {
		defer unsubscribe()
		for {
			select {
			case <-arrived:
			case <-ctx.Done():
				return
			}
			if !g.began.Load() && s.elsewhere(ctx, root, l, spec) {
				g.moved.Store(true)
				r.Close()
				return
			}
		}
	})
	return g
}

// guarded is a reader that says when it was closed for its blob being elsewhere.
type guarded struct {
	io.ReadCloser
	cancel       context.CancelFunc
	began, moved atomic.Bool
}

func (g *guarded) Read(p []byte) (int, error) {
	n, err := g.ReadCloser.Read(p)
	if n > 0 {
		g.began.Store(true)
	}
	if err != nil && g.moved.Load() {
		err = fmt.Errorf("its content store is elsewhere: %w", unpack.ErrRestarted)
	}
	return n, err
}

func (g *guarded) Close() error {
	g.cancel()
	return g.ReadCloser.Close()
}
