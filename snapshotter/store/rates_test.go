// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

func TestRatesOutliveTheDaemon(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	hdd, unpack := s.Rates.Get()
	require.Equal(t, []float64{priorHDD, priorUnpack}, []float64{hdd, unpack})
	s.Rates.sawHDD(1<<20, time.Second) // too little to tell anything
	for range 100 {
		s.Rates.sawHDD(200<<20, time.Second)
		s.Rates.SawUnpack(300<<20, time.Second)
	}
	require.NoError(t, s.Close())

	s = b.open(nil)
	hdd, unpack = s.Rates.Get()
	require.InEpsilon(t, 200<<20, hdd, 0.01)
	require.InEpsilon(t, 300<<20, unpack, 0.01)

	require.NoError(t, s.db.update(t.Context(), func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Put(keyRates, []byte(`{"hdd":-1}`))
	}))
	require.NoError(t, s.Close())
	s = b.open(nil)
	hdd, unpack = s.Rates.Get()
	require.Equal(t, []float64{priorHDD, priorUnpack}, []float64{hdd, unpack}, "nonsense was believed")
}

// What brings one piece to the disk may bring its neighbours along.
func TestRateOfTheDiskIsOfBytesAndTime(t *testing.T) {
	s := newBench(t).open(nil)
	for i := range 300 {
		took := 3 * time.Microsecond
		if i%3 == 0 {
			took = 90 * time.Millisecond
		}
		s.Rates.sawHDD(4<<20, took)
		if hdd, _ := s.Rates.Get(); i > 60 {
			require.InEpsilon(t, 140e6, hdd, 0.2)
		}
	}
	s.Rates.sawHDD(4<<20, 0)
	hdd, _ := s.Rates.Get()
	require.Less(t, hdd, 180e6)
}

func TestConfiguredRate(t *testing.T) {
	b := newBench(t)
	s := b.open(func(c *Config) { c.HDDRate = 7 })
	for range 50 {
		s.Rates.sawHDD(200<<20, time.Second)
	}
	hdd, unpack := s.Rates.Get()
	require.Equal(t, []float64{7, priorUnpack}, []float64{hdd, unpack})
}
