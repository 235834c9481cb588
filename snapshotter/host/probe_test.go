// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"os"
	"testing"

	"github.com/containerd/containerd/v2/pkg/testutil"
	"github.com/stretchr/testify/require"
)

func TestProbe(t *testing.T) {
	testutil.RequiresRoot(t)
	dir := t.TempDir()
	f, err := Probe(dir, Image())
	require.NoError(t, err)
	t.Logf("%+v", f)
	require.NoError(t, f.Check())
	require.True(t, f.DataOnly)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}
