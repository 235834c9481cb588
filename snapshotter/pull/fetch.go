// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// mostImages is how many images with a blob are tried in one namespace.
const mostImages = 3

// stalledAfter is when a registry that sends nothing is given up.
const stalledAfter = time.Minute

// WithRegistries says how registries are reached. Without it those of Fetch are reached by HTTPS, without credentials.
func WithRegistries(hosts docker.RegistryHosts) Option {
	return func(w *Watcher) { w.hosts = hosts }
}

// Fetch opens a blob in the registry of an image that has it in one of the namespaces, and is known by a name. It is for blobs
// that containerd has lost; nothing is written to the content store. The bytes are not verified. image is the name that
// was taken, on failure the one that was tried last, "" if there was none. Closing r ends the download, and so does ctx.
//
// Errors: errdefs.ErrNotFound if no image has the blob; ErrUnavailable if containerd is absent.
func (w *Watcher) Fetch(ctx context.Context, spaces []string, blob ocispec.Descriptor) (r io.ReadCloser, image string, err error) {
	what := fmt.Sprintf("fetch blob %s", blob.Digest)
	var failed []string
	for _, ns := range spaces {
		all, err := w.Images(ctx, ns)
		if err != nil {
			return nil, image, fmt.Errorf("%s: %w", what, err)
		}
		for _, img := range all {
			if !slices.ContainsFunc(img.Layers, func(l LayerInfo) bool { return l.Digest == blob.Digest }) || !nameable(img.Name) {
				continue
			}
			image = img.Name
			r, err := w.fetch(ctx, img.Name, blob)
			if err == nil {
				return r, image, nil
			}
			text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "httpReadSeeker: failed open: "), "failed to do request: ")
			if failed = append(failed, fmt.Sprintf("from %s: %s", img.Name, text)); len(failed) == mostImages {
				break
			}
		}
	}
	if len(failed) == 0 {
		return nil, "", fmt.Errorf("%s: no image in namespace %s has it: %w", what, strings.Join(spaces, ", "), errdefs.ErrNotFound)
	}
	return nil, image, fmt.Errorf("%s %s: %w", what, strings.Join(failed, ", "), errdefs.ErrUnavailable)
}

// nameable reports whether a name of an image may lead to a registry. CRI names images by the digests of their configs, too.
func nameable(name string) bool {
	_, err := reference.Parse(name)
	return err == nil
}

func (w *Watcher) fetch(ctx context.Context, name string, blob ocispec.Descriptor) (io.ReadCloser, error) {
	fetcher, err := docker.NewResolver(docker.ResolverOptions{Hosts: w.hosts}).Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s := &stalling{cancel: cancel}
	s.timer = time.AfterFunc(stalledAfter, func() {
		cancel(fmt.Errorf("the registry has sent nothing for %s: %w", stalledAfter, errdefs.ErrUnavailable))
	})
	s.ctx = ctx
	if s.body, err = fetcher.Fetch(ctx, blob); err != nil {
		s.timer.Stop()
		cancel(nil)
		return nil, err
	}
	// The registry is asked by the first read.
	first := bufio.NewReader(s)
	if _, err := first.Peek(1); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return opened{first, s}, nil
}

// opened is a download that has begun.
type opened struct {
	io.Reader
	io.Closer
}

// stalling is a download that ends when nothing comes any more.
type stalling struct {
	body   io.ReadCloser
	ctx    context.Context //nolint:containedctx // that of the download, whose cause is told
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (s *stalling) Read(p []byte) (int, error) {
	s.timer.Reset(stalledAfter)
	n, err := s.body.Read(p)
	if cause := context.Cause(s.ctx); err != nil && !errors.Is(err, io.EOF) && cause != nil {
		err = cause
	}
	return n, err
}

func (s *stalling) Close() error {
	s.timer.Stop()
	err := s.body.Close()
	s.cancel(nil)
	return err
}
