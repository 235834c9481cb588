// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// fetches is how many blobs are fetched again at a time. They take no place of
// unpackings for which a pull waits.
const fetches = 2

// refetch is what is known of the blob of a damaged layer that containerd has lost
// and that is fetched from a registry. Guarded by Store.mu.
type refetch struct {
	image string        // whose registry was asked, "" if no image has the blob
	err   error         // of the latest try; nil: none has failed
	pause time.Duration // after it
	until time.Time     // when the pause is over
}

func (r *refetch) failed(err error) {
	r.err, r.pause = err, min(max(2*r.pause, retryFirst), retryMost)
	r.until = time.Now().Add(r.pause)
}

// unpackAnew unpacks the blob of a layer again, into the same number. Called with
// the layer's run lock held. A blob that nobody is fetching does not come by waiting
// for it: one that containerd has lost is fetched, which takes its time beside the
// executor.
func (s *Store) unpackAnew(ctx context.Context, rec Layer) error {
	if s.config.Blobs == nil {
		return fmt.Errorf("unpack layer %s anew: no containerd is configured: %w", rec.ID, errdefs.ErrUnavailable)
	}
	l, err := s.layer(rec.ID)
	if err != nil {
		return err
	}
	spaces, err := s.namespacesOf(ctx, rec)
	if err != nil {
		return fmt.Errorf("unpack layer %s anew: %w", rec.ID, err)
	}
	spec := Spec{Namespace: rec.Namespace, Blob: rec.Blob, Size: rec.Size, MediaType: rec.MediaType, DiffID: rec.DiffID}
	for _, ns := range spaces {
		provider, err := s.config.Blobs.Provider(ctx, ns)
		if err != nil {
			return fmt.Errorf("unpack layer %s anew: %w", rec.ID, err)
		}
		r, err := unpack.FromProvider(ctx, provider, descriptor(rec))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("unpack layer %s anew: blob %s: %w", rec.ID, rec.Blob, err)
		}
		defer r.Close()
		return s.unpackFrom(ctx, l, rec, spec, r)
	}
	return s.fetchAnew(l, rec, spec, spaces)
}

// fetchAnew begins to unpack a blob that comes from a registry. After a failure the
// registry has a pause, whoever asks.
func (s *Store) fetchAnew(l *layer, rec Layer, spec Spec, spaces []string) error {
	s.mu.Lock()
	if err := l.refetch.err; err != nil && time.Now().Before(l.refetch.until) {
		s.mu.Unlock()
		return err
	}
	s.mu.Unlock()
	spec.open = func(ctx context.Context) (io.ReadCloser, error) {
		r, image, err := s.config.Blobs.Fetch(ctx, spaces, descriptor(rec))
		s.mu.Lock()
		l.refetch.image = image
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
		log.G(ctx).WithFields(log.Fields{"layer": rec.ID, "blob": rec.Blob, "image": image}).
			Warn("containerd has lost the blob of a damaged layer; it is fetched again from the registry of the image")
		return r, nil
	}
	s.start(l, spec)
	return nil
}

// namespacesOf are the namespaces of containerd whose content store may have the
// blob of a layer: first the one in which it was pulled, then those that use it.
func (s *Store) namespacesOf(ctx context.Context, rec Layer) ([]string, error) {
	var spaces []string
	if rec.Namespace != "" {
		spaces = append(spaces, rec.Namespace)
	}
	err := s.db.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return own(tx, bucketSnapshots).ForEach(func(k, _ []byte) error {
			sn, err := GetSnapshot(tx, string(k))
			if err == nil && sn.Layer == rec.ID && sn.Namespace != "" && !slices.Contains(spaces, sn.Namespace) {
				spaces = append(spaces, sn.Namespace)
			}
			return err
		})
	})
	return spaces, err
}
