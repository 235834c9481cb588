// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"os"
	"testing"
)

// scratch is a directory for regions: SCM_BENCH_DIR, else memory where there is some, else the usual one.
func scratch(t testing.TB) string {
	t.Helper()
	base := os.Getenv("SCM_BENCH_DIR")
	if base == "" {
		base = "/dev/shm"
	}
	dir, err := os.MkdirTemp(base, "scmlib-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
