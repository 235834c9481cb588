// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestReleaseIsAskedForEverLessOften(t *testing.T) {
	var r release
	now := time.Unix(0, 0)
	asked := func(held int64, minutes int) (n int) {
		for range minutes {
			now = now.Add(replan)
			if r.due(held, now) {
				n++
			}
		}
		return n
	}
	require.Zero(t, asked(0, 100), "nothing is held")
	require.Equal(t, 1, asked(5, 2))
	n := asked(5, 24*60)
	require.Greater(t, n, 20)
	require.Less(t, n, 40)
	require.Equal(t, 1, asked(6, 2), "more is held")
	require.Zero(t, asked(0, 100))
	require.Equal(t, 1, asked(1, 2))
}
