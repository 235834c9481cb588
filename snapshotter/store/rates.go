// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// Rates is what the policies know of this machine, measured while it works and
// kept in the database for the next start.
type Rates struct {
	db *database

	set float64 // the HDD's as configured; 0: as measured

	mu      sync.Mutex
	changed bool
	HDD     float64 `json:"hdd"`    // bytes/s at which the HDD takes packs
	Unpack  float64 `json:"unpack"` // bytes/s at which layers are unpacked, uncompressed
}

// What a machine is taken for until it has shown better.
const (
	// The emulated hard disk takes one file at 140 MB/s (integration/hddsim); others use the disk too.
	priorHDD = 100e6
	// One gzip layer at a time into a pack.
	priorUnpack = 140e6
)

// least is the fewest bytes that tell something of a rate.
const leastToRate = 4 << 20

var keyRates = []byte("rates")

// loadRates reads what an earlier run has measured. hdd, where it is not 0, takes
// the place of what is measured of the HDD.
func loadRates(ctx context.Context, db *database, hdd float64) (*Rates, error) {
	r := &Rates{db: db, set: hdd, HDD: priorHDD, Unpack: priorUnpack}
	err := db.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		b := tx.Bucket(bucketOwn).Get(keyRates)
		if b == nil {
			return nil
		}
		if err := json.Unmarshal(b, r); err != nil || !(r.HDD > 0) || !(r.Unpack > 0) {
			log.G(ctx).WithError(err).Warn("measured rates are unreadable and will be measured anew")
			r.HDD, r.Unpack = priorHDD, priorUnpack
		}
		return nil
	})
	return r, err
}

// Get returns the rates in bytes/s.
func (r *Rates) Get() (hdd, unpack float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.set > 0 {
		return r.set, r.Unpack
	}
	return r.HDD, r.Unpack
}

// sawHDD takes in a piece of a pack. Pieces are small, and what brings one to the disk may bring the next along, as a
// commit of the journal does: the next takes no time then.
func (r *Rates) sawHDD(bytes int64, took time.Duration) { r.saw(&r.HDD, 0.1, bytes, took) }

func (r *Rates) SawUnpack(bytes int64, took time.Duration) { r.saw(&r.Unpack, 0.3, bytes, took) }

// saw takes in a measurement with a weight. Times are averaged, not rates: a piece that took no time has an endless rate.
func (r *Rates) saw(rate *float64, weight float64, bytes int64, took time.Duration) {
	if bytes < leastToRate || took < 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	*rate = 1 / ((1-weight) / *rate + weight*took.Seconds()/float64(bytes))
	r.changed = true
}

// save keeps what was measured for the next start.
func (r *Rates) save(ctx context.Context) {
	r.mu.Lock()
	b, err := json.Marshal(map[string]float64{"hdd": r.HDD, "unpack": r.Unpack})
	changed := r.changed
	r.changed = false
	r.mu.Unlock()
	if !changed {
		return
	}
	if err == nil {
		err = r.db.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
			return tx.Bucket(bucketOwn).Put(keyRates, b)
		})
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot keep measured rates")
	}
}
