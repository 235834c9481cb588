//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// bin is where the programs are: bin/ as seen from this package's directory, unless the environment says otherwise.
func bin() string {
	if dir := os.Getenv("NHYBRID_BIN"); dir != "" {
		return dir
	}
	return "../../../bin"
}

func execute(ctx context.Context, log io.Writer, args ...string) error {
	c := Command()
	c.SetArgs(append([]string{"--size=small", "--drop-caches=false", "--bin=" + bin(), "--idle=100ms"}, args...))
	c.SetErr(log)
	c.SilenceUsage, c.SilenceErrors = true, true
	return c.ExecuteContext(ctx)
}

// checkGone fails the test where this process has left a mount or its scratch directory.
func checkGone(t *testing.T) {
	t.Helper()
	dir := filepath.Join(os.TempDir(), "nhbench-"+strconv.Itoa(os.Getpid()))
	require.NoDirExists(t, dir)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	require.Empty(t, mounts)
}

// Not parallel with the next: both have the scratch directory of this process.
func TestDeploySmall(t *testing.T) {
	out := t.TempDir()
	args := []string{
		"--out=" + out, "--rounds=1", "--images=middle", "--links=1Gbit", "--repetitions=3", "--capture-files=1000",
		"--variants=" + strings.Join([]string{overlayHDD, overlayNVM, overlayNVMBest, hybrid, lass, lassBest}, ","),
	}
	var log bytes.Buffer
	require.NoError(t, execute(t.Context(), io.MultiWriter(&log, t.Output()), args...))
	checkGone(t)
	r, err := result.Read(filepath.Join(out, "deploy.json"))
	require.NoError(t, err)
	for _, figure := range []string{
		"durable_vs_nvm_1g", "durable_vs_hdd_1g", "durable_vs_best_1g", "durable_vs_link_1g", "durable_vs_nvm_1g.lass", "nvm_saved_1g",
		"nvm_saved_1g.lass-best", "cpu_vs_overlayfs", "daemon_peak_mb", "write_amplification_hdd", "link_rate_1g", "link_rate_three_1g",
		"prepare_overhead_ms", "capture_1k_s", "capture_1k_peak_mb", "remove_1k_s", "view_bytes_per_file_1k", "hot_in_place", "first_start_after_pull_vs_nvm", "daemon_idle_rss_mb",
	} {
		require.Contains(t, r.Figures, figure)
	}
	for _, figure := range []string{
		"durable_vs_nvm_1g", "durable_vs_best_1g", "durable_vs_link_1g", "link_rate_1g", "daemon_idle_rss_mb", "daemon_peak_mb", "capture_1k_s", "remove_1k_s",
		"write_amplification_hdd",
	} {
		require.Positive(t, r.Figures[figure], figure)
	}
	require.Less(t, r.Figures["nvm_saved_1g.nvm"], 0.5, "all is on NVM")
	require.InDelta(t, 1, r.Figures["nvm_saved_1g.hdd"], 0.1, "nothing is on NVM")
	var text strings.Builder
	require.NoError(t, r.Markdown(&text))
	require.Contains(t, text.String(), "| middle | 1Gbit | lass |")

	// The runs are there: nothing is pulled again.
	require.Equal(t, 6, strings.Count(log.String(), "returned"))
	log.Reset()
	require.NoError(t, execute(t.Context(), &log, append(args, "--skip=prepare,metadata,hot")...))
	require.NotContains(t, log.String(), "returned")
	again, err := result.Read(filepath.Join(out, "deploy.json"))
	require.NoError(t, err)
	require.Equal(t, r.Figures["durable_vs_nvm_1g"], again.Figures["durable_vs_nvm_1g"])

	// Another image beside it is pulled alone.
	log.Reset()
	require.NoError(t, execute(t.Context(), &log,
		"--out="+out, "--rounds=1", "--images=middle,top", "--links=1Gbit", "--variants="+overlayNVM, "--skip=prepare,metadata,hot"))
	require.Equal(t, 1, strings.Count(log.String(), "returned"))
	require.Contains(t, log.String(), "top, 1Gbit, nvm: returned")
}

// cancelOn cancels when a text is written.
type cancelOn struct {
	text   string
	cancel context.CancelFunc
}

func (c cancelOn) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(c.text)) {
		c.cancel()
	}
	return len(p), nil
}

func TestInterruptedMeasurementLeavesItsRunsAndNothingElse(t *testing.T) {
	out := t.TempDir()
	args := []string{"--out=" + out, "--rounds=1", "--images=top", "--links=0", "--variants=" + overlayNVM + "," + lass, "--skip=prepare,metadata,hot"}
	ctx, cancel := context.WithCancel(t.Context())
	require.ErrorContains(t, execute(ctx, cancelOn{"1/2", cancel}, args...), "goes on where it was")
	checkGone(t)
	require.NoFileExists(t, filepath.Join(out, "deploy.json"))

	var log bytes.Buffer
	require.NoError(t, execute(t.Context(), &log, args...))
	checkGone(t)
	require.NotContains(t, log.String(), "1/2")
	require.Contains(t, log.String(), "2/2")
}
