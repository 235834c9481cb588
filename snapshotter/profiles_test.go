// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// within fails a test whose call waits for something that comes only afterwards.
func within(t *testing.T, what string, call func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		require.NoError(t, err, what)
	case <-time.After(20 * time.Second):
		t.Fatal(what + " waits")
	}
}

// Commit and Remove of containerd are write transactions of the same database: none waits while a profile is decoded, merged and encoded.
func TestProfilesChangeOutsideOfTransactions(t *testing.T) {
	s := start(t, t.TempDir(), nil, nil)
	p := profiles{s.store, store.BucketProfiles}
	image := digest.FromString("image")
	changing, goOn := make(chan struct{}), make(chan struct{})
	var tries []string
	updated := make(chan error, 1)
	go func() {
		updated <- p.Update(image, func(old []byte) ([]byte, error) {
			if tries = append(tries, string(old)); len(tries) == 1 {
				close(changing)
				<-goOn
			}
			return append(old, "+late"...), nil
		})
	}()
	<-changing
	unblock := sync.OnceFunc(func() { close(goOn) })
	defer unblock()
	within(t, "a write transaction", func() error {
		return s.store.UpdateTx(t.Context(), func(context.Context, *bolt.Tx) error { return nil })
	})
	within(t, "another change", func() error {
		return p.Update(image, func([]byte) ([]byte, error) { return []byte("first"), nil })
	})
	unblock()
	require.NoError(t, <-updated)
	require.Equal(t, []string{"", "first"}, tries, "what came in between is not lost")
	data, err := p.Get(image)
	require.NoError(t, err)
	require.Equal(t, "first+late", string(data))

	failure := errors.New("no")
	require.ErrorIs(t, p.Update(image, func([]byte) ([]byte, error) { return nil, failure }), failure)
	require.NoError(t, p.Update(image, func(old []byte) ([]byte, error) { return old, nil }))
	require.NoError(t, p.Update(image, func([]byte) ([]byte, error) { return nil, nil }))
	data, err = p.Get(image)
	require.NoError(t, err)
	require.Nil(t, data)
}

// However many change one profile at a time, each finds what the others did.
func TestProfilesAreNotLost(t *testing.T) {
	s := start(t, t.TempDir(), nil, nil)
	p := profiles{s.store, store.BucketProfiles}
	const n = 16
	var work sync.WaitGroup
	for i := range n {
		work.Go(func() {
			if err := p.Update("sha256:x", func(old []byte) ([]byte, error) { return fmt.Appendf(old, "<%d>", i), nil }); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	data, err := p.Get("sha256:x")
	require.NoError(t, err)
	for i := range n {
		require.Contains(t, string(data), fmt.Sprintf("<%d>", i))
	}
}
