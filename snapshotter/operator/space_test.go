// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

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
