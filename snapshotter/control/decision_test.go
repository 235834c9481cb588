// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

// What is shown of a decision is what it was made of: a blob whose bytes have all come, and which containerd is still
// bringing to the disk, counted as downloading here and not for the policy.
func TestDecisionShowsWhatItWasMadeOf(t *testing.T) {
	lass, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	in := placement.Input{Sequential: true, NVMFree: 1 << 40, Layers: []placement.Layer{
		{Digest: "a", Compressed: 100},
		{Digest: "b", Compressed: 100, Offset: 100},
		{Digest: "c", Compressed: 100, Offset: 100, Downloaded: true},
	}}
	m := NewDecision(lass.Decide(in))
	require.Equal(t, "nvm", m.Tier)
	require.Zero(t, m.Downloading)
	require.Zero(t, m.BytesLeft)

	in.Layers[1].Offset = 60
	m = NewDecision(lass.Decide(in))
	require.Equal(t, "hdd", m.Tier)
	require.EqualValues(t, 1, m.Downloading)
	require.EqualValues(t, 40, m.BytesLeft)
	require.Equal(t, in.Layers[0].Size(), m.Size)
	require.False(t, m.SizeExact)

	in.Index = 3 // refused by Decide, and nothing to look up here
	m = NewDecision(lass.Decide(in))
	require.Equal(t, "hdd", m.Tier)
	require.Zero(t, m.Size)
}
