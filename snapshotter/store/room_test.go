// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

func TestShortages(t *testing.T) {
	plenty := Room{Free: 900, Total: 1000, Reserve: 50, InodesFree: 90_000, Inodes: 100_000, InodesReserve: 5000}
	for name, c := range map[string]struct {
		tier   placement.Tier
		change func(*Room)
		says   string // "": nothing
	}{
		"NVM has room":           {placement.NVM, func(*Room) {}, ""},
		"NVM is full":            {placement.NVM, func(r *Room) { r.Free = 50 }, "NVM is full"},
		"NVM lacks inodes":       {placement.NVM, func(r *Room) { r.InodesFree = 6000 }, "too few inodes: 6000 of 100000"},
		"NVM has no inode":       {placement.NVM, func(r *Room) { r.InodesFree = 0 }, "0 of 100000 free, the reserve is 5000, so that layers and writable directories go to HDD, and containers that write on NVM fail"},
		"NVM counts no inodes":   {placement.NVM, func(r *Room) { r.InodesFree, r.Inodes, r.InodesReserve = 0, 0, 0 }, ""},
		"HDD has room":           {placement.HDD, func(r *Room) { r.Free = 10 }, ""},
		"HDD is nearly full":     {placement.HDD, func(r *Room) { r.Free = 9 }, "nearly full"},
		"HDD is full":            {placement.HDD, func(r *Room) { r.Free = 0 }, "no pull succeeds"},
		"HDD has few inodes":     {placement.HDD, func(r *Room) { r.InodesFree = 4999 }, "few inodes: 4999 of 100000"},
		"HDD has no inode":       {placement.HDD, func(r *Room) { r.InodesFree = 0 }, "no inode free of 100000"},
		"HDD counts no inodes":   {placement.HDD, func(r *Room) { r.InodesFree, r.Inodes = 0, 0 }, ""},
		"HDD has inodes and 1 %": {placement.HDD, func(r *Room) { r.Free, r.InodesFree = 10, 5000 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := plenty
			if c.tier == placement.HDD {
				r.Reserve, r.InodesReserve = 0, 0
			}
			c.change(&r)
			all := r.Shortages(c.tier)
			if c.says == "" {
				require.Empty(t, all)
				return
			}
			require.Len(t, all, 1)
			require.Contains(t, all[0], c.says)
		})
	}
}

func TestRoom(t *testing.T) {
	r := Room{Free: 500, Total: 1000, Reserve: 100, InodesFree: 20, Inodes: 100, InodesReserve: 10}
	bytes, inodes := r.Left()
	require.EqualValues(t, 400, bytes)
	require.EqualValues(t, 10, inodes)
	require.False(t, r.Full())
	require.EqualValues(t, 200, r.Scarcer(), "a fifth of the inodes is worth a fifth of the bytes")
	r.InodesFree = 10
	require.True(t, r.Full())
	r.InodesFree, r.Inodes, r.InodesReserve = 0, 0, 0
	require.False(t, r.Full())
	require.EqualValues(t, 500, r.Scarcer())
}
