// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestCPUOfCountsChildrenThatHaveEnded(t *testing.T) {
	before, err := CPUOf(os.Getpid())
	require.NoError(t, err)
	var children time.Duration
	for children < 200*time.Millisecond {
		child := exec.CommandContext(t.Context(), "sh", "-c", "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done")
		require.NoError(t, child.Run())
		children += child.ProcessState.UserTime() + child.ProcessState.SystemTime()
	}
	after, err := CPUOf(os.Getpid())
	require.NoError(t, err)
	// The kernel rounds each of the four numbers down to a tick.
	require.GreaterOrEqual(t, after-before, children-4*clockTick)
}

func TestBusyCPUIsAtLeastThatOfAProcess(t *testing.T) {
	before, err := BusyCPU()
	require.NoError(t, err)
	child := exec.CommandContext(t.Context(), "sh", "-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
	require.NoError(t, child.Run())
	after, err := BusyCPU()
	require.NoError(t, err)
	// Half of it: the kernel may find out by sampling.
	require.GreaterOrEqual(t, after-before, (child.ProcessState.UserTime()+child.ProcessState.SystemTime())/2)
}
