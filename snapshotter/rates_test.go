// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

func TestRatesOutliveTheDaemon(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, nil)
	hdd, unpack := s.rates.get()
	require.Equal(t, []float64{priorHDD, priorUnpack}, []float64{hdd, unpack})
	s.rates.sawHDD(1<<20, time.Second) // too little to tell anything
	for range 50 {
		s.rates.sawHDD(100<<20, time.Second)
		s.rates.sawUnpack(300<<20, time.Second)
	}
	require.NoError(t, s.Close())

	s = start(t, dir, nil)
	hdd, unpack = s.rates.get()
	require.InEpsilon(t, 100<<20, hdd, 0.01)
	require.InEpsilon(t, 300<<20, unpack, 0.01)

	require.NoError(t, s.db.update(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Put(keyRates, []byte(`{"hdd":-1}`))
	}))
	require.NoError(t, s.Close())
	s = start(t, dir, nil)
	hdd, unpack = s.rates.get()
	require.Equal(t, []float64{priorHDD, priorUnpack}, []float64{hdd, unpack}, "nonsense was believed")
}
