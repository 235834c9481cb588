// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// rates is what the policies know of this machine, measured while it works and
// kept in the database for the next start.
type rates struct {
	db *database

	mu      sync.Mutex
	changed bool
	HDD     float64 `json:"hdd"`    // bytes/s at which the HDD takes file trees
	Unpack  float64 `json:"unpack"` // bytes/s at which containerd unpacks, uncompressed
}

// What a machine is taken for until it has shown better.
const (
	// Layers of Debian packages on ext4 reached an emulated hard disk of 140 MB/s
	// at 29 to 47 MB/s: 1146 writes of 176 kB with a seek each.
	priorHDD = 30e6
	// containerd's applier with one gzip layer into memory did 130 to 145 MB/s.
	priorUnpack = 140e6
)

// least is the fewest bytes that tell something of a rate.
const leastToRate = 4 << 20

var keyRates = []byte("rates")

// loadRates reads what an earlier run has measured.
func loadRates(ctx context.Context, db *database) (*rates, error) {
	r := &rates{db: db, HDD: priorHDD, Unpack: priorUnpack}
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

func (r *rates) get() (hdd, unpack float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.HDD, r.Unpack
}

func (r *rates) sawHDD(bytes int64, took time.Duration) { r.saw(&r.HDD, bytes, took) }

func (r *rates) sawUnpack(bytes int64, took time.Duration) { r.saw(&r.Unpack, bytes, took) }

// saw takes a measurement in.
func (r *rates) saw(rate *float64, bytes int64, took time.Duration) {
	if bytes < leastToRate || took <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	*rate = 0.7**rate + 0.3*float64(bytes)/took.Seconds()
	r.changed = true
}

// save keeps what was measured for the next start.
func (r *rates) save(ctx context.Context) {
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
