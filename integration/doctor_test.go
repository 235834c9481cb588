//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// finding is one of nhybridctl doctor --json.
type finding struct{ Area, Level, Text, Cure string }

// examine runs nhybridctl doctor on a containerd configuration, once by containerd's word and once by the file alone.
func examine(t *testing.T, r *rig.Rig, config string, args ...string) []finding {
	t.Helper()
	var all []finding
	for _, containerd := range []string{program(t, "containerd"), ""} {
		out, err := r.Nhybridctl(soon(t), append([]string{
			"doctor", "--json", "--config", filepath.Join(r.Dir, "nhybrid.toml"), "--containerd-config", config, "--containerd", containerd,
		}, args...)...)
		var answer struct {
			OK       bool
			Findings []finding
		}
		require.NoError(t, json.Unmarshal([]byte(out), &answer), "%s: %v", out, err)
		failed := slices.ContainsFunc(answer.Findings, func(f finding) bool { return f.Level == "fail" })
		require.Equal(t, !failed, answer.OK)
		require.Equal(t, failed, err != nil, "the exit code tells")
		if containerd == "" {
			require.ElementsMatch(t, troubles(all), troubles(answer.Findings), "with and without containerd's program")
		}
		all = answer.Findings
	}
	return all
}

// random is what differs in the names of trials.
var random = regexp.MustCompile(`\.trial-[0-9]+`)

// troubles are what is not ok, without what has been measured.
func troubles(all []finding) (bad []string) {
	for _, f := range all {
		if f.Level != "ok" && !strings.Contains(f.Text, "is on a slow disk") { // which is measured
			bad = append(bad, random.ReplaceAllString(fmt.Sprintf("%s %s: %s; cure: %s", f.Level, f.Area, f.Text, f.Cure), "*"))
		}
	}
	return bad
}

// On a good installation doctor finds nothing, and each mistake with its cure.
func TestDoctor(t *testing.T) {
	// Not parallel: it sets environment variables.
	r := newRig(t, rig.Options{ConcurrentUnpacks: 3, CRI: true})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(soon(t), "busybox:1"))
	settled(t, r)
	config := filepath.Join(r.Dir, "containerd.toml")
	before := print(t, r.NVM, r.HDD)
	good := examine(t, r, config)
	require.Greater(t, len(good), 12)
	// What the rig's emulated NVM may lack.
	usual := slices.DeleteFunc(troubles(good), func(s string) bool {
		return strings.Contains(s, "project quotas") || strings.Contains(s, "survives a process crash")
	})
	require.Empty(t, usual)
	require.Equal(t, before, print(t, r.NVM, r.HDD), "what the trials made is gone")

	text, err := os.ReadFile(config)
	require.NoError(t, err)
	expect := func(t *testing.T, found []finding, level string, words ...string) {
		t.Helper()
		require.True(t, slices.ContainsFunc(found, func(f finding) bool {
			whole := f.Text + "; cure: " + f.Cure
			return f.Level == level && f.Cure != "" && !strings.Contains(whole, "\n") &&
				!slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(whole, w) })
		}), "no %s with all of %q and a cure in\n%s", level, words, strings.Join(troubles(found), "\n"))
	}
	for _, c := range []struct {
		name     string
		old, new string
		level    string
		want     []string
	}{
		// It is found by its address, under whatever name.
		{"another name", "[proxy_plugins.nhybrid", "[proxy_plugins.other", "fail", []string{"unpack_config", `"other"`}},
		{"proxy plugin elsewhere", r.DaemonSocket(), "/run/other.sock", "fail", []string{"/run/other.sock", r.DaemonSocket()}},
		{"wrong type", "type = 'snapshot'", "type = 'content'", "fail", []string{"content", `type = "snapshot"`}},
		{"no exports", "root = '" + r.HDD + "'", "", "warn", []string{"exports", r.HDD}},
		{"wrong exports", "root = '" + r.HDD + "'", "root = '/var/lib/other'", "warn", []string{"/var/lib/other", r.HDD}},
		{"no annotations", "enable_remote_snapshot_annotations = 'true'", "", "warn", []string{"enable_remote_snapshot_annotations"}},
		{"no remap-ids", "'remap-ids', ", "", "warn", []string{"remap-ids"}},
		{"another differ", "differ = 'nhybrid-diff'", "differ = 'walking'", "warn", []string{"unpack_config", "nhybrid-diff", "after they have arrived"}},
		{"another differ in parallel", "differ = 'nhybrid-diff'", "differ = 'walking'", "warn", []string{"max_concurrent_unpacks", "implies"}},
		{"no unpack_config", "snapshotter = 'nhybrid'\n    differ", "snapshotter = 'native'\n    differ", "fail", []string{"unpack_config", "nhybrid"}},
		{"pods elsewhere", "snapshotter = 'nhybrid'\n  [plugins.'io.containerd.cri.v1.images'.pinned", "snapshotter = 'overlayfs'\n  [plugins.'io.containerd.cri.v1.images'.pinned", "warn", []string{"CRI", "overlayfs", "nhybrid"}},
		{"containerd elsewhere", "address = '" + r.ContainerdSocket() + "'", "address = '/run/other/c.sock'", "fail", []string{"/run/other/c.sock", r.ContainerdSocket(), "containerd.address"}},
		{"no TOML", "version = 4", "version = = 4", "fail", []string{"toml"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.Contains(t, string(text), c.old)
			bad := filepath.Join(t.TempDir(), "containerd.toml")
			require.NoError(t, os.WriteFile(bad, []byte(strings.ReplaceAll(string(text), c.old, c.new)), 0o600))
			if c.name == "no TOML" { // in whose words differs
				out, err := r.Nhybridctl(soon(t), "doctor", "--containerd-config", bad, "--containerd", "")
				require.Error(t, err)
				require.Contains(t, out, bad)
				require.Contains(t, out, "cure: ")
				return
			}
			expect(t, examine(t, r, bad), c.level, c.want...)
		})
	}
	t.Run("no proxy plugin", func(t *testing.T) {
		bad := filepath.Join(t.TempDir(), "containerd.toml")
		require.NoError(t, os.WriteFile(bad, []byte("version = 4\n"), 0o600))
		expect(t, examine(t, r, bad), "fail", "proxy_plugins.nhybrid", r.DaemonSocket())
	})
	t.Run("containerd down", func(t *testing.T) {
		require.NoError(t, r.Containerd.Stop())
		defer func() { require.NoError(t, r.Containerd.Start(soon(t))) }()
		expect(t, examine(t, r, config), "fail", "does not reach containerd", r.ContainerdSocket())
	})
	t.Run("daemon down", func(t *testing.T) {
		require.NoError(t, r.Daemon.Stop())
		defer func() { require.NoError(t, r.Daemon.Start(soon(t))) }()
		// The daemon was told its roots on the command line, doctor is by the environment.
		t.Setenv("NHYBRID_ROOT", r.HDD)
		t.Setenv("NHYBRID_NVM_ROOT", r.NVM)
		t.Setenv("NHYBRID_ADDRESS", r.DaemonSocket())
		found := examine(t, r, config)
		expect(t, found, "fail", r.ControlSocket(), "start")
		require.Len(t, slices.DeleteFunc(troubles(found), func(s string) bool { return !strings.HasPrefix(s, "fail") }), 1)

		t.Run("read-only NVM", func(t *testing.T) {
			mountpoint := filepath.Dir(r.NVM)
			require.NoError(t, unix.Mount("", mountpoint, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			defer func() { require.NoError(t, unix.Mount("", mountpoint, "", unix.MS_REMOUNT, "")) }()
			expect(t, examine(t, r, config), "fail", r.NVM, "read-only", "remount")
		})
		t.Run("NVM not there", func(t *testing.T) {
			t.Setenv("NHYBRID_NVM_ROOT", "/nowhere/nvm/nhybrid")
			expect(t, examine(t, r, config), "fail", "/nowhere/nvm", "mount")
		})
		t.Run("one filesystem", func(t *testing.T) {
			t.Setenv("NHYBRID_NVM_ROOT", filepath.Join(filepath.Dir(r.HDD), "nvm"))
			expect(t, examine(t, r, config), "warn", "same filesystem")
		})
		t.Run("filesystem that overlayfs cannot use", func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, unix.Mount("proc", dir, "proc", 0, ""))
			defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
			t.Setenv("NHYBRID_ROOT", dir)
			found := examine(t, r, config)
			require.NotEmpty(t, slices.DeleteFunc(troubles(found), func(s string) bool { return !strings.HasPrefix(s, "fail hdd") }))
		})
	})
}
