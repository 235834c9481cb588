// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// binary builds the demo, to run it as make does: a process that is interrupted, or that stays.
func binary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "demo")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return path
}

// show is a demo of the tiny image with a place and an out of its own, that is gone after the test.
func show(t *testing.T, program string, args ...string) (cmd *exec.Cmd, name, out string) {
	t.Helper()
	out = t.TempDir()
	name = fmt.Sprintf("%d-%s", os.Getpid(), strings.ToLower(t.Name()[len("Test"):])[:4])
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	cmd = exec.CommandContext(ctx, program, append([]string{"-tiny", "-out", out, "-name", name}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	t.Cleanup(func() {
		if out, err := exec.Command(program, "-clean", "-name", name).CombinedOutput(); err != nil {
			t.Errorf("clean: %v: %s", err, out)
		}
	})
	return cmd, name, out
}

func checkGone(t *testing.T, name string) {
	t.Helper()
	dir := filepath.Join(os.TempDir(), "nh-demo-"+name)
	left, err := filepath.Glob(dir + "*")
	require.NoError(t, err)
	require.Empty(t, left)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	require.Empty(t, mounts)
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/sys/block/loop*/loop/backing_file"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil { // else it is gone in the meantime
				require.NotContains(t, string(b), dir+"/", f)
			}
		}
	}
}

func TestShow(t *testing.T) {
	t.Parallel()
	guest := t.TempDir()
	// The largest layer alone takes six seconds.
	cmd, name, out := show(t, binary(t), "-hdd", guest, "-rate", "20Mbit")
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	checkGone(t, name)
	left, err := os.ReadDir(guest)
	require.NoError(t, err)
	require.Empty(t, left)

	rep := reportIn(t, out)
	require.Contains(t, rep.Image, imageName)
	require.Equal(t, "drain", rep.Policy, "the daemon's default")
	require.Len(t, rep.Layers, len(tinyRecipe.names))
	seen := map[string]bool{}
	var stored int64
	for i, l := range rep.Layers {
		require.Equal(t, int32(i), l.Index)
		require.Regexp(t, `^sha256:[0-9a-f]{64}$`, l.Digest)
		require.False(t, seen[l.Digest])
		seen[l.Digest] = true
		require.Positive(t, l.Bytes)
		require.NotEmpty(t, l.Reason)
		require.Contains(t, string(text), l.Reason)
		stored += l.Stored
	}
	require.Equal(t, stored, rep.Stored)
	require.Positive(t, rep.Layers[3].Early, "the large layer was stored while it downloaded: %s", text)
	require.Less(t, rep.Pull.DownloadedS, rep.Pull.StoredS)
	require.Less(t, rep.Pull.StoredS, rep.Pull.DurableS)
	for _, start := range []result{rep.First, rep.Second} {
		require.Equal(t, tinyRecipe.command, start.Command)
		require.Zero(t, start.Exit)
		require.Contains(t, start.Output, "7 entries, shared is of layer 5")
		require.Positive(t, start.ReadyMS)
	}
	require.Positive(t, rep.Files)
	require.Positive(t, rep.AfterStart.Files+rep.AfterStart.Parts, "what the start opened: %s", text)
	require.Positive(t, rep.AfterStart.Views)
	require.Less(t, rep.AfterStart.all(), rep.Stored/2, "the large layer is not opened: %s", text)
	require.Contains(t, string(text), "On NVM in the end: "+rep.share(rep.AfterStart.all()))
}

func reportIn(t *testing.T, out string) (rep report) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(out, "demo.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &rep))
	return rep
}

// TestPolicy shows that the demo runs with the policy that it is told.
func TestPolicy(t *testing.T) {
	t.Parallel()
	cmd, _, out := show(t, binary(t), "-policy", "nvm")
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	rep := reportIn(t, out)
	require.Equal(t, "nvm", rep.Policy)
	require.GreaterOrEqual(t, rep.AfterPull.Files, rep.Stored, "%s", text)
	require.Less(t, rep.AfterStart.Files, rep.Stored/2, "cold files have left: %s", text)
}

// TestInterrupt stops the demo, orderly and not, where most is set up: in the middle of the pull.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	program := binary(t)
	cmd, name, out := show(t, program, "-rate", "10Mbit")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cmd := exec.CommandContext(t.Context(), program, cmd.Args[1:]...)
		stdout, err := cmd.StdoutPipe()
		require.NoError(t, err)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		require.NoError(t, cmd.Start())
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if strings.Contains(lines.Text(), " decision ") {
				require.NoError(t, cmd.Process.Signal(sig))
			}
		}
		require.Error(t, cmd.Wait())
		if sig == syscall.SIGINT {
			require.Equal(t, "demo: interrupted; everything is taken down\n", stderr.String())
		} else {
			text, err := exec.CommandContext(t.Context(), program, "-clean", "-out", out, "-name", name).CombinedOutput()
			require.NoError(t, err, "%s", text)
		}
		checkGone(t, name)
	}
}

// TestKeep pastes every line that a demo which stays has printed.
func TestKeep(t *testing.T) {
	t.Parallel()
	program := binary(t)
	cmd, name, _ := show(t, program, "-keep")
	text, err := cmd.Output() // returns: whatever stays has let go of the pipe
	require.NoError(t, err, "%s", text)
	_, lines, found := strings.Cut(string(text), "It is left running")
	require.True(t, found, "%s", text)
	tools := map[string]int{}
	tool := regexp.MustCompile(`^(?:NERDCTL_TOML=\S+ )?\S*/(ctr|nerdctl|crictl|nhybridctl) `)
	for line := range strings.Lines(lines) {
		m := tool.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		tools[m[1]]++
		paste := exec.CommandContext(t.Context(), "sh", "-c", line)
		paste.Dir = "/"
		out, err := paste.CombinedOutput()
		require.NoError(t, err, "%s\n%s", line, out)
		if strings.Contains(line, " run ") {
			require.Contains(t, string(out), "7 entries", line)
		}
	}
	for _, tool := range []string{"ctr", "crictl", "nhybridctl"} {
		require.NotZero(t, tools[tool], "lines for %s in:\n%s", tool, text)
	}
	if _, err := os.Stat(filepath.Join("../../bin", ".nerdctl-unobtainable")); err != nil {
		require.NotZero(t, tools["nerdctl"], "%s", text)
	}

	second, err := exec.CommandContext(t.Context(), program, "-tiny", "-name", name).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(second), "one runs already")
	out, err := exec.CommandContext(t.Context(), program, "-clean", "-name", name).CombinedOutput()
	require.NoError(t, err, "%s", out)
	checkGone(t, name)
}

func TestBadOptions(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"-policy nonsense", `unknown policy "nonsense"`},
		{"-rate fast", `rate of the link: rate "fast"`},
		{"surplus", `unexpected argument "surplus"`},
	} {
		_, err := parse(strings.Fields(c.args), &strings.Builder{})
		require.ErrorContains(t, err, c.want)
	}
	p, err := openPlace(fmt.Sprintf("%d-bad", os.Getpid()))
	require.NoError(t, err)
	defer func() { require.NoError(t, p.remove()) }()
	require.NoError(t, p.enter())
	_, err = openPlace(fmt.Sprintf("%d-bad", os.Getpid()))
	require.ErrorIs(t, err, errBusy)
	_, err = p.tier("NVM", filepath.Join(t.TempDir(), "missing"))
	require.ErrorContains(t, err, "name a directory or a block device")
	_, err = p.tier("NVM", os.DevNull)
	require.ErrorContains(t, err, "neither a directory nor a block device")

	taken := t.TempDir()
	theirs := filepath.Join(taken, filepath.Base(p.dir)+"-nvm")
	require.NoError(t, os.Mkdir(theirs, 0o755))
	_, err = p.tier("NVM", taken)
	require.ErrorIs(t, err, os.ErrExist)
	require.Empty(t, p.note.Guests, "what is not ours is not ours to remove")
	require.NoError(t, rig.Remove(p.dir))
	require.DirExists(t, theirs)
}
