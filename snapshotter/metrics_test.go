// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Both tiers tell of bytes and inodes.
func TestMetricsOfTiers(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	root, nvm, clean, err := newTiers(dir, "16m,nr_inodes=1000")
	require.NoError(t, err)
	p, err := placement.ParsePolicy("nvm")
	require.NoError(t, err)
	s, err := New(context.Background(), Config{Store: store.Config{Root: root, NVMRoot: nvm, State: filepath.Join(dir, "state")}, Policy: p})
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.NoError(t, clean())
	})
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(s.Metrics()))
	families, err := registry.Gather()
	require.NoError(t, err)
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "tier" && l.GetValue() == "nvm" {
					values[f.GetName()] = m.GetGauge().GetValue()
				}
			}
		}
	}
	require.EqualValues(t, 1000, values["nhybrid_tier_total_inodes"])
	require.Positive(t, values["nhybrid_tier_free_inodes"])
	require.Less(t, values["nhybrid_tier_free_inodes"], 1000.0)
	require.Positive(t, values["nhybrid_tier_free_bytes"])
}
