// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package thread

import (
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestMain calls from the first thread, which goroutines get now and then.
func TestMain(m *testing.M) {
	runtime.LockOSThread()
	first := make(chan int)
	go Run(func() { first <- unix.Gettid() })
	if <-first == os.Getpid() {
		panic("it runs on the first thread")
	}
	runtime.UnlockOSThread()
	os.Exit(m.Run())
}

func TestNeverTheFirstThread(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/uts")
	require.NoError(t, err)
	for range 2000 {
		var tid int
		Run(func() {
			tid = unix.Gettid()
			if os.Geteuid() == 0 {
				require.NoError(t, unix.Unshare(unix.CLONE_NEWUTS))
			}
		})
		require.NotEqual(t, os.Getpid(), tid)
	}
	after, err := os.Readlink("/proc/self/ns/uts")
	require.NoError(t, err)
	require.Equal(t, before, after)
}
