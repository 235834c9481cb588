// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

// A read transaction lasts as long as its reader takes, of the copy on HDD as long as that disk takes. bbolt maps a database that has outgrown its mapping anew, for which
// it waits for all readers, and lets no other begin: containerd would wait with it.
func TestWritersDoNotWaitForReaders(t *testing.T) {
	t.Parallel()
	d, err := openDatabase(t.Context(), t.TempDir())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.ms.Close()) })
	reading, goOn := make(chan struct{}), make(chan struct{})
	read := make(chan error, 1)
	go func() {
		read <- d.view(t.Context(), func(context.Context, *bolt.Tx) error {
			close(reading)
			<-goOn
			return nil
		})
	}()
	<-reading
	unblock := sync.OnceFunc(func() { close(goOn) })
	defer unblock()
	wrote := make(chan error, 1)
	go func() {
		wrote <- d.update(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
			return own(tx, BucketProfiles).Put([]byte("large"), make([]byte, 8<<20))
		})
	}()
	select {
	case err := <-wrote:
		require.NoError(t, err)
	case <-time.After(20 * time.Second):
		unblock()
		t.Fatal("a writer waits for a reader")
	}
	unblock()
	require.NoError(t, <-read)
}
