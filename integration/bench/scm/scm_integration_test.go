//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// TestQuick runs all but the crash tests, which are tests themselves, with tiny sizes.
func TestQuick(t *testing.T) {
	for _, p := range []string{"libpmemobj-dev", "libsqlite3-dev", "redis-server", "redis-tools", "gcc"} {
		if err := exec.Command("dpkg-query", "-W", p).Run(); err != nil {
			t.Skipf("needs the Debian package %s, which make bench-scm installs", p)
		}
	}
	bin := os.Getenv("NHYBRID_BIN")
	if bin == "" {
		bin = "../../../bin"
	}
	out := t.TempDir()
	var log bytes.Buffer
	c := Command()
	c.SetArgs([]string{"--quick", "--bin=" + bin, "--out=" + out, "--skip=crash"})
	c.SetErr(io.MultiWriter(&log, t.Output()))
	require.NoError(t, c.ExecuteContext(t.Context()))

	dir := filepath.Join(os.TempDir(), "nhbench-"+strconv.Itoa(os.Getpid()))
	require.NoDirExists(t, dir)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	require.Empty(t, mounts)

	r, err := result.Read(filepath.Join(out, "scm.json"))
	require.NoError(t, err)
	for _, g := range targets {
		switch g.Figure {
		case "tx10_fences", "states_failed", "mutants_survived": // of the crash tests
		default:
			require.Contains(t, r.Figures, g.Figure)
		}
	}
	require.FileExists(t, filepath.Join(out, "scm-bench.svg"))
	survives := map[string]string{}
	for _, table := range r.Tables {
		if len(table.Rows) == 0 || len(table.Head) < 7 || table.Head[6] != "survives" {
			continue
		}
		for _, row := range table.Rows {
			survives[row[1]] = row[6]
		}
	}
	for contender, want := range map[string]string{
		"C host": "process crash", "Go container": "process crash", "Go volume": "process crash", "C storage": "process crash", "C dram": "volatile", "PMDK": "process crash",
		"bbolt host file": "process crash", "SQLite host memory file": "process crash", "file storage": "process crash",
	} {
		require.Equal(t, want, survives[contender], contender)
	}
}
