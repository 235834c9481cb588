// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/host"
)

func TestTrace(t *testing.T) {
	nvm := host.Dir{Path: tmpfs(t, 0)}
	has(t, Trace(nvm), OK, "trace", "fanotify tells")

	missing := host.Dir{Path: filepath.Join(nvm.Path, "missing")}
	all := Trace(missing)
	has(t, all, Warn, "trace", "no such file or directory")
	require.NotContains(t, all[0].Text, "refused")
}

// The kernel itself refuses: this thread has no CAP_SYS_ADMIN.
func TestTraceIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("there is no capability to drop")
	}
	nvm := host.Dir{Path: t.TempDir()}
	found := make(chan []Finding, 1)
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		err := unix.Capget(&h, &d[0])
		d[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		failed <- errors.Join(err, unix.Capset(&h, &d[0]))
		found <- Trace(nvm)
	}()
	require.NoError(t, <-failed)
	all := <-found
	require.Len(t, all, 1)
	has(t, all, Warn, "trace", "open a fanotify group: operation not permitted: cold starts are not traced: hot files")
	require.Contains(t, all[0].Cure, "CAP_SYS_ADMIN")
	require.NotContains(t, strings.ToLower(all[0].Text), "cap_sys_admin")
}
