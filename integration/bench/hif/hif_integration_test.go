//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
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
	c.SetArgs(append([]string{"--quick", "--bin=" + bin()}, args...))
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
func TestQuick(t *testing.T) {
	out := t.TempDir()
	args := []string{
		"--out=" + out, "--images=busybox,eclipse-mosquitto", "--many=busybox,eclipse-mosquitto", "--first=eclipse-mosquitto",
		"--curve=eclipse-mosquitto", "--containers=3",
		"--drop-caches=false", // other tests look into them
	}
	var log bytes.Buffer
	require.NoError(t, execute(t.Context(), io.MultiWriter(&log, t.Output()), args...))
	checkGone(t)
	r, err := result.Read(filepath.Join(out, "hif.json"))
	require.NoError(t, err)
	for _, figure := range []string{
		"trace_missing_max", "nvm_saved_mean", "nvm_saved_mean_warm", "nvm_saved_mean_default_readahead", "nvm_saved_min", "second_start_hdd_reads_max", "second_start_vs_nvm", "second_start_vs_hdd",
		"first_start_profile_vs_nvm", "integrity_errors", "trace_overhead", "static_recall", "static_precision", "crowd_foreign_files",
		"crowd_3_vs_nvm", "first_start_layers_vs_nvm", "link_rate_1g", "link_rate_three_1g", "daemon_idle_cpu_share", "trace_kb_per_1000_files",
	} {
		require.Contains(t, r.Figures, figure)
	}
	// What does not depend on how fast the machine is.
	require.Zero(t, r.Figures["integrity_errors"])
	require.Zero(t, r.Figures["trace_missing_max"])
	require.Zero(t, r.Figures["crowd_files_outside"])
	require.Positive(t, r.Figures["nvm_saved_mean"])
	require.Less(t, r.Figures["nvm_saved_mean"], 1.0)
	require.Positive(t, r.Figures["static_recall"])
	var text strings.Builder
	require.NoError(t, r.Markdown(&text))
	require.Contains(t, text.String(), "| eclipse-mosquitto | CONNECT is accepted |")
	picture, err := os.Open(filepath.Join(out, "nvm-occupancy.svg"))
	require.NoError(t, err)
	defer picture.Close()
	for d := xml.NewDecoder(picture); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else {
			require.NoError(t, err)
		}
	}

	// The rows are there: nothing is measured again.
	require.Contains(t, log.String(), "saved")
	log.Reset()
	require.NoError(t, execute(t.Context(), &log, args...))
	require.NotContains(t, log.String(), "saved")
	again, err := result.Read(filepath.Join(out, "hif.json"))
	require.NoError(t, err)
	require.Equal(t, r.Figures, again.Figures)
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

func TestInterruptedMeasurementTellsWhatItHas(t *testing.T) {
	out := t.TempDir()
	args := []string{"--out=" + out, "--images=busybox,eclipse-mosquitto", "--hdd-starts=0", "--skip=saved,first,crowds,costs,curve"}
	ctx, cancel := context.WithCancel(t.Context())
	require.ErrorContains(t, execute(ctx, cancelOn{"1/2", cancel}, args...), "goes on where it was")
	checkGone(t)
	r, err := result.Read(filepath.Join(out, "hif.json"))
	require.NoError(t, err)
	require.Equal(t, 1.0, r.Figures["images"])
	require.Len(t, r.Notes, 1)
}
