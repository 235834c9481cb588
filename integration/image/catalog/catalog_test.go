// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCatalogHasEveryImageOfTheTable(t *testing.T) {
	all, err := All()
	require.NoError(t, err)
	require.Len(t, all, 32)
	categories := map[string]int{}
	for _, img := range all {
		categories[img.Category]++
		require.NotEmpty(t, img.Sign, img.Name)
		require.True(t, img.Ready != nil || img.Output != "", img.Name)
		require.NotEmpty(t, append(img.Config.Entrypoint, img.Config.Cmd...), img.Name)
		for _, step := range img.Steps {
			for _, e := range step.Files {
				require.NotEqual(t, '/', e.Name[0], img.Name)
			}
		}
	}
	require.Len(t, categories, 6)
}

func TestScriptsAreExecutable(t *testing.T) {
	entries, err := read("redis")
	require.NoError(t, err)
	modes := map[string]int64{}
	for _, e := range entries {
		modes[e.Name] = e.Mode
	}
	require.EqualValues(t, 0o755, modes["usr/local/bin/docker-entrypoint.sh"])
	require.Contains(t, modes, "usr/local/bin/")
	_, err = read("no such image")
	require.Error(t, err)
}
