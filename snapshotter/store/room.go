// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"math"

	"github.com/nhybrid/nhybrid/placement"
)

// Room is what a filesystem has, in bytes and in inodes.
type Room struct {
	Free, Total, Reserve int64 // bytes
	// Inodes is 0 where the filesystem has no limit of them.
	InodesFree, Inodes, InodesReserve int64
}

// Room tells what a tier has. HDD has no reserve.
func (s *Store) Room(t placement.Tier) (r Room, err error) {
	if r.Free, r.Total, err = s.Tiers.Space(t); err != nil {
		return Room{}, err
	}
	if r.InodesFree, r.Inodes, err = s.Tiers.Inodes(t); err != nil {
		return Room{}, err
	}
	if t == placement.NVM {
		r.Reserve = s.config.Reserve(r.Total)
		r.InodesReserve = s.config.ReserveInodes(r.Total, r.Inodes)
	}
	return r, nil
}

// Left is how many bytes and inodes may still be taken; inodes without a limit
// are [math.MaxInt64].
func (r Room) Left() (bytes, inodes int64) {
	inodes = math.MaxInt64
	if r.Inodes > 0 {
		inodes = max(0, r.InodesFree-r.InodesReserve)
	}
	return max(0, r.Free-r.Reserve), inodes
}

// Full reports whether a tier takes no more layers.
func (r Room) Full() bool {
	bytes, inodes := r.Left()
	return bytes == 0 || inodes == 0
}

// Scarcer is the free bytes of a filesystem, or what its free inodes are worth in
// bytes where they are the smaller share: who keeps so much of the bytes free
// keeps as large a share of the inodes free.
func (r Room) Scarcer() int64 {
	if r.Inodes <= 0 {
		return r.Free
	}
	return min(r.Free, int64(float64(r.Total)*float64(r.InodesFree)/float64(r.Inodes)))
}

// LeastInodes is how many files a new writable directory must be able to take.
const LeastInodes = 1000
