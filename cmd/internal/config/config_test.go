// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"flag"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write config.toml.example anew")

func TestExampleIsTheDefault(t *testing.T) {
	const file = "../../../config.toml.example"
	want, err := Default().Marshal()
	require.NoError(t, err)
	if *update {
		require.NoError(t, os.WriteFile(file, want, 0o644))
	}
	have, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), string(have), "run go test ./cmd/internal/config -update")

	c, err := Parse(file, have)
	require.NoError(t, err)
	require.Equal(t, Default(), c)
}
