// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"slices"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// profiles keeps profiles in a bucket of the database.
type profiles struct {
	s      *store.Store
	bucket []byte
}

var _ profile.Store = profiles{}

// Get implements [profile.Store].
func (p profiles) Get(image digest.Digest) (data []byte, err error) {
	err = p.s.ViewTx(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		data = slices.Clone(store.Profiles(tx, p.bucket).Get([]byte(image)))
		return nil
	})
	return data, err
}

// Update implements [profile.Store]. change runs outside of any transaction, since it decodes and encodes up to 32 MiB of JSON while Commit and Remove of
// containerd would wait for the one write transaction. Where another change came in between it runs again, on what that one has left.
func (p profiles) Update(image digest.Digest, change func([]byte) ([]byte, error)) error {
	for {
		old, err := p.Get(image)
		if err != nil {
			return err
		}
		data, err := change(slices.Clone(old))
		if err != nil || bytes.Equal(data, old) { // a commit would sync the file
			return err
		}
		if err := p.swap(image, old, data); !errors.Is(err, errChanged) {
			return err
		}
	}
}

var errChanged = errors.New("the profile was changed meanwhile")

// swap writes data if old is what is there, nil for nothing. errChanged: it is not.
func (p profiles) swap(image digest.Digest, old, data []byte) error {
	return p.s.UpdateTx(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		b := store.Profiles(tx, p.bucket)
		switch {
		case !bytes.Equal(b.Get([]byte(image)), old):
			return errChanged
		case data == nil:
			return b.Delete([]byte(image))
		}
		return b.Put([]byte(image), data)
	})
}

// Each implements [profile.Store].
func (p profiles) Each(f func(digest.Digest, []byte) error) error {
	return p.s.ViewTx(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		return store.Profiles(tx, p.bucket).ForEach(func(k, v []byte) error { return f(digest.Digest(k), v) })
	})
}

func (s *Snapshotter) newHot(ctx context.Context) error {
	if s.config.Hot == nil {
		return nil
	}
	pins, err := tier.NewPins(s.store.Tiers.DataRoot())
	if err != nil {
		return err
	}
	s.pins = pins
	h := hotStore{s, pins}
	s.hot, err = hif.New(ctx, *s.config.Hot, h, h, hif.Books{
		Profiles: profiles{s.store, store.BucketProfiles}, Predictions: profiles{s.store, store.BucketPredictions}, Origins: profiles{s.store, store.BucketOrigins},
	})
	return err
}
