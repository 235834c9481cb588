// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

func TestShortages(t *testing.T) {
	plenty := store.Room{Free: 900, Total: 1000, Reserve: 50, InodesFree: 90_000, Inodes: 100_000, InodesReserve: 5000}
	for name, c := range map[string]struct {
		tier   placement.Tier
		change func(*store.Room)
		says   string // "": nothing
	}{
		"NVM has room":           {placement.NVM, func(*store.Room) {}, ""},
		"NVM is full":            {placement.NVM, func(r *store.Room) { r.Free = 50 }, "NVM is full"},
		"NVM lacks inodes":       {placement.NVM, func(r *store.Room) { r.InodesFree = 6000 }, "too few inodes: 6000 of 100000"},
		"NVM counts no inodes":   {placement.NVM, func(r *store.Room) { r.InodesFree, r.Inodes, r.InodesReserve = 0, 0, 0 }, ""},
		"HDD has room":           {placement.HDD, func(r *store.Room) { r.Free = 10 }, ""},
		"HDD is nearly full":     {placement.HDD, func(r *store.Room) { r.Free = 9 }, "nearly full"},
		"HDD is full":            {placement.HDD, func(r *store.Room) { r.Free = 0 }, "no pull succeeds"},
		"HDD has few inodes":     {placement.HDD, func(r *store.Room) { r.InodesFree = 4999 }, "few inodes: 4999 of 100000"},
		"HDD has no inode":       {placement.HDD, func(r *store.Room) { r.InodesFree = 0 }, "no inode free of 100000"},
		"HDD counts no inodes":   {placement.HDD, func(r *store.Room) { r.InodesFree, r.Inodes = 0, 0 }, ""},
		"HDD has inodes and 1 %": {placement.HDD, func(r *store.Room) { r.Free, r.InodesFree = 10, 5000 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := plenty
			if c.tier == placement.HDD {
				r.Reserve, r.InodesReserve = 0, 0
			}
			c.change(&r)
			all := shortages(c.tier, r)
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
	r := store.Room{Free: 500, Total: 1000, Reserve: 100, InodesFree: 20, Inodes: 100, InodesReserve: 10}
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

// Where inodes are scarcer than bytes, migrate status shows both as they are, as status does.
func TestMigrationShowsBytesAndInodes(t *testing.T) {
	limits := plan.Limits{High: 0.9, Low: 0.8}
	m := &control.MigrationState{}
	fillNVM(m, store.Room{Free: 900_000, Total: 1_000_000, Reserve: 50_000, InodesFree: 100, Inodes: 1000, InodesReserve: 50}, limits)
	require.EqualValues(t, 100_000, m.NvmUsed)
	require.EqualValues(t, 1_000_000, m.NvmTotal)
	require.EqualValues(t, 50_000, m.Reserve)
	require.EqualValues(t, 855_000, m.High)
	require.EqualValues(t, 760_000, m.Low)
	require.EqualValues(t, 900, m.InodesUsed)
	require.EqualValues(t, 1000, m.Inodes)
	require.EqualValues(t, 855, m.InodesHigh, "the same share as of the bytes")
	require.EqualValues(t, 760, m.InodesLow)
	require.EqualValues(t, 50, m.InodesReserve)

	m = &control.MigrationState{}
	fillNVM(m, store.Room{Free: 400_000, Total: 1_000_000}, limits) // no limit of inodes
	require.EqualValues(t, 600_000, m.NvmUsed)
	require.Zero(t, m.Inodes+m.InodesUsed+m.InodesHigh+m.InodesLow+m.InodesReserve)
}
