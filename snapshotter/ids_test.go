// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

// A transaction that fails leaves its id to the next snapshot, whose files must
// not go with those of the failed one.
func TestFailedPrepareHurtsNobody(t *testing.T) {
	s := start(t, t.TempDir(), nil, nil)
	ctx := inNamespace(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 200 {
			_, err := s.Prepare(ctx, "test/1/taken", "")
			if err == nil {
				continue // the first
			}
		}
	})
	for range 3 {
		wg.Go(func() {
			for i := range 60 {
				bad := snapshots.WithLabels(map[string]string{
					snapshots.LabelSnapshotUIDMapping: "5:100000:65536", snapshots.LabelSnapshotGIDMapping: "5:100000:65536",
				})
				if _, err := s.Prepare(ctx, fmt.Sprintf("test/2/bad%d", i), "", bad); err == nil {
					t.Error("a map without root was taken")
				}
			}
		})
	}
	keys := make([]string, 200)
	for i := range keys {
		keys[i] = fmt.Sprintf("test/3/good%d", i)
		_, err := s.Prepare(ctx, keys[i], "")
		require.NoError(t, err)
	}
	wg.Wait()
	for _, key := range keys {
		mounts, err := s.Mounts(ctx, key)
		require.NoError(t, err)
		require.DirExists(t, mounts[0].Source, "the directory of %s is gone", key)
	}
}

// What a kill left between making directories and the end of the transaction
// has an id that the database does not know, and must not give out again.
func TestIDsOfLeftoversAreNotGivenOut(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, nil, nil)
	ctx := inNamespace(t)
	_, err := s.Prepare(ctx, "test/1/a", "")
	require.NoError(t, err)
	require.NoError(t, s.Close())
	for i := 2; i <= 5; i++ {
		require.NoError(t, mkdirs(s.store.Tiers.Staging(placement.NVM, strconv.Itoa(i))+"/fs"))
	}
	s = start(t, dir, nil, nil)
	mounts, err := s.Prepare(ctx, "test/1/b", "")
	require.NoError(t, err)
	require.NoError(t, s.store.RemoveNow(ctx, "6"), "an id that lives was taken for garbage")
	require.DirExists(t, mounts[0].Source)
	require.Equal(t, s.store.Tiers.Staging(placement.NVM, "6")+"/fs", mounts[0].Source)
	require.Eventually(t, func() bool {
		_, err := os.Lstat(s.store.Tiers.Staging(placement.NVM, "5"))
		return os.IsNotExist(err)
	}, awaitFor, awaitEvery)
}
