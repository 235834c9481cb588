// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// What a container has written is counted where it is asked for, and not known elsewhere; an orphan counts once, as an orphan.
func TestControlCountsWhatIsWritten(t *testing.T) {
	s := start(t, t.TempDir(), newDownloads(t), nil)
	ctx, c := inNamespace(t), s.Control()
	const size = 1 << 20
	mounts, err := s.Prepare(ctx, "test/1/build", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "made"), []byte(noise(3, size)), 0o600))

	list := func(ctx context.Context, count bool) (all []*control.Snapshot, err error) {
		err = c.List(ctx, &control.ListRequest{Count: count}, func(m *control.Snapshot) error { all = append(all, m); return nil })
		return all, err
	}
	all, err := list(ctx, false)
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Nil(t, all[0].NvmBytes)
	require.Nil(t, all[0].HddBytes)
	require.Nil(t, all[0].Inodes)
	all, err = list(ctx, true)
	require.NoError(t, err)
	require.GreaterOrEqual(t, all[0].GetNvmBytes(), int64(size))
	require.Zero(t, all[0].GetHddBytes())
	require.EqualValues(t, 2, all[0].GetInodes())
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = list(ended, true)
	require.ErrorIs(t, err, context.Canceled, "a walk ends with the request")

	inspected, err := c.Inspect(ctx, &control.InspectRequest{Ref: "test/1/build"})
	require.NoError(t, err)
	require.Equal(t, all[0].GetNvmBytes(), inspected.GetSnapshot().GetNvmBytes())
	usage, err := c.Usage(ctx, &control.UsageRequest{})
	require.NoError(t, err)
	require.Equal(t, all[0].GetNvmBytes(), usage.GetTiers()[0].GetUppers())
	require.Empty(t, usage.GetOrphans())

	require.NoError(t, s.Commit(ctx, "test/2/built", "test/1/build"))
	_, err = s.Usage(ctx, "test/2/built") // waits until it is packed
	require.NoError(t, err)
	usage, err = c.Usage(ctx, &control.UsageRequest{})
	require.NoError(t, err)
	require.Len(t, usage.GetOrphans(), 1)
	orphan := usage.GetOrphans()[0]
	require.Equal(t, "test/2/built", orphan.GetKey())
	require.GreaterOrEqual(t, orphan.GetNvmBytes()+orphan.GetHddBytes(), int64(size))
	var orphans int64
	for _, tier := range usage.GetTiers() {
		require.Zero(t, tier.GetLayers(), "each byte is counted once")
		require.Zero(t, tier.GetUppers())
		orphans += tier.GetOrphans()
	}
	require.Equal(t, orphan.GetNvmBytes()+orphan.GetHddBytes(), orphans)

	// As a parent it is no orphan any more.
	_, err = s.View(ctx, "test/3/view", "test/2/built")
	require.NoError(t, err)
	usage, err = c.Usage(ctx, &control.UsageRequest{})
	require.NoError(t, err)
	require.Empty(t, usage.GetOrphans())
	require.Zero(t, usage.GetTiers()[0].GetOrphans()+usage.GetTiers()[1].GetOrphans())
	require.GreaterOrEqual(t, usage.GetTiers()[0].GetLayers()+usage.GetTiers()[1].GetLayers(), int64(size))
	all, err = list(ctx, false)
	require.NoError(t, err)
	require.Equal(t, "view", all[len(all)-1].GetKind())
	require.Empty(t, all[len(all)-1].GetTier(), "nothing is written to a view")
	require.Zero(t, all[len(all)-1].GetNvmBytes())
}
