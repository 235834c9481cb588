// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/store"
)

func snapshot(kind snapshots.Kind, key, parent string, layer store.LayerID) store.Entry {
	return store.Entry{ID: key, Info: snapshots.Info{Kind: kind, Name: key, Parent: parent}, Snapshot: store.Snapshot{Layer: layer}}
}

func TestOrphansNeedNobody(t *testing.T) {
	all := []store.Entry{
		snapshot(snapshots.KindCommitted, "x/1/base", "", 1),
		snapshot(snapshots.KindCommitted, "x/2/app", "x/1/base", 2),
		snapshot(snapshots.KindCommitted, "x/3/used", "", 3),
		snapshot(snapshots.KindActive, "x/4/container", "x/3/used", 0),
		snapshot(snapshots.KindCommitted, "x/5/built", "x/1/base", 5),
		snapshot(snapshots.KindView, "x/6/view", "", 0),
	}
	names := map[string][]string{"x app": {"app:1"}, "x base": {"app:1"}}
	require.Equal(t, map[string]bool{"x/5/built": true}, orphans(all, names, nil))
	require.Empty(t, orphans(all, names, map[string]bool{"x": true}), "containerd does not tell the images")
}

// An orphan whose layer stays with another snapshot gives nothing back, and says so.
func TestOrphanOfASharedLayer(t *testing.T) {
	sn := snapshot(snapshots.KindCommitted, "x/5/built", "", 5)
	c := counted{known: true, bytes: [2]int64{10, 20}}
	o := orphan(sn, c, true)
	require.EqualValues(t, 30, o.NvmBytes+o.HddBytes)
	o = orphan(sn, c, false)
	require.Zero(t, o.NvmBytes+o.HddBytes)
	require.Contains(t, o.Reason, "another snapshot has its layer")
}

// What is in a directory is not in the database: it is walked, or not known.
func TestRecordedSizes(t *testing.T) {
	active := snapshot(snapshots.KindActive, "x/1/web", "", 0)
	c, dir := recorded(active)
	require.Equal(t, counted{}, c)
	require.Equal(t, active.ID, dir)

	staged := snapshot(snapshots.KindCommitted, "x/2/built", "", 2)
	staged.Of = &store.Layer{State: store.Staged, Snapshot: "7"}
	c, dir = recorded(staged)
	require.False(t, c.known)
	require.Equal(t, "7", dir)

	staged.Of = &store.Layer{State: store.Home, Pack: 100, NVM: 10, Usage: snapshots.Usage{Inodes: 3}}
	c, dir = recorded(staged)
	require.Empty(t, dir)
	require.Equal(t, counted{known: true, bytes: staged.Of.Bytes(), inodes: 3}, c)

	c, dir = recorded(snapshot(snapshots.KindView, "x/3/view", "", 0))
	require.Empty(t, dir)
	require.Equal(t, counted{known: true}, c)
}
