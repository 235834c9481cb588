// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"flag"
	"os"
	"syscall"
	"testing"
	"time"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

func mkdirs(dirs ...string) error {
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// TestMain switches on the root tests of containerd's suite, which skips them
// unless told by a flag that other packages do not know.
func TestMain(m *testing.M) {
	flag.Parse()
	if os.Geteuid() == 0 {
		if err := flag.Set("test.root", "true"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// Tests wait for background work, never for a time.
const (
	awaitFor   = 10 * time.Second
	awaitEvery = time.Millisecond
)

func statOf(info os.FileInfo) *syscall.Stat_t {
	return info.Sys().(*syscall.Stat_t)
}
