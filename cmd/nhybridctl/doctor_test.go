// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/cmd/nhybridctl/doctor"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// containerdConfig is one that fits the daemon's, for machines without containerd.
func containerdConfig(t *testing.T, c config.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(file, []byte(`
version = 3
root = '`+t.TempDir()+`'
[proxy_plugins.nhybrid]
  type = 'snapshot'
  address = '`+c.Address+`'
  exports = { root = '`+c.Root+`', enable_remote_snapshot_annotations = 'true' }
[proxy_plugins.nhybrid-diff]
  type = 'diff'
  address = '`+c.Address+`'
[plugins.'io.containerd.transfer.v1.local']
  unpack_config = [ { platform = 'linux/`+runtime.GOARCH+`', snapshotter = 'overlayfs', differ = 'walking' }, { platform = 'linux', snapshotter = 'nhybrid', differ = 'nhybrid-diff' } ]
`), 0o600))
	return file
}

func TestDoctor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("doctor mounts, which needs root")
	}
	c := config.Default()
	c.Root, c.NVMRoot = filepath.Join(t.TempDir(), "hdd"), filepath.Join(t.TempDir(), "nvm")
	socket := serve(t, &backend{}, c)
	args := []string{"doctor", "--address", socket, "--containerd", "", "--containerd-config", containerdConfig(t, c)}
	code, out, errs := ctl(t, args...)
	require.Zero(t, code, out)
	require.Empty(t, errs)
	require.Contains(t, out, "ok    daemon: v1.2.3 answers")
	require.Contains(t, out, "warn  daemon: 1 jobs of queue sync failed: no space left on device")
	require.Contains(t, out, "warn  daemon: starts are not traced")
	require.Equal(t, 1, strings.Count(out, "same filesystem"))
	require.Contains(t, out, "warn  tiers: both tiers stand on the same filesystem")
	require.Contains(t, out, "ok    containerd: snapshotter \"nhybrid\"")
	require.Contains(t, out, "ok    containerd: differ \"nhybrid-diff\"")
	require.Contains(t, out, "ok    images: all layers can be used")
	require.Contains(t, out, "warn  mounts: the mount namespaces of containerd and the daemon were not compared")
	require.Contains(t, out, "warn  containerd: capability remap-ids is missing")
	require.Contains(t, out, " 0 failures\n")

	code, out, _ = ctl(t, append(args, "--json")...)
	require.Zero(t, code)
	var report struct {
		OK       bool             `json:"ok"`
		Findings []doctor.Finding `json:"findings"`
	}
	require.NoError(t, json.Unmarshal([]byte(out), &report))
	require.True(t, report.OK)
	require.NotEmpty(t, report.Findings)
	for _, f := range report.Findings {
		require.NotEmpty(t, f.Area+string(f.Level)+f.Text)
		require.Equal(t, f.Level == doctor.OK, f.Cure == "", f.Text)
	}

	// Another address in containerd's file.
	wrong := c
	wrong.Address = "/run/other.sock"
	code, out, errs = ctl(t, "doctor", "--address", socket, "--containerd", "", "--containerd-config", containerdConfig(t, wrong))
	require.Equal(t, exitFailure, code)
	require.Empty(t, errs)
	require.Contains(t, out, `fail  containerd: [proxy_plugins.nhybrid] has address "/run/other.sock"`)
}

// What is wrong is said once, with its cure, and nothing else contradicts it.
func TestDoctorSaysEachFaultOnce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("doctor mounts, which needs root")
	}
	c := config.Default()
	c.Root, c.NVMRoot = filepath.Join(t.TempDir(), "hdd"), filepath.Join(t.TempDir(), "nvm")
	const trouble = "checksum of file 3 is wrong; it is fetched again now and then; fetch it by hand: ctr -n x content fetch y"
	socket := serve(t, &backend{trouble: trouble, warnings: []string{
		"layer 9 of a:1 cannot be used: " + trouble, "root and nvm_root stand on one filesystem, so that placement has no effect; give NVM a filesystem of its own",
		"work on layer 7 has failed and is tried again: no space left on device; make room", "regions are not served: sweep \"/mnt/nvm/nhybrid/r/tmp\": operation not permitted",
	}}, c)
	code, out, errs := ctl(t, "doctor", "--address", socket, "--containerd", "", "--containerd-config", containerdConfig(t, c))
	require.Equal(t, exitFailure, code)
	require.Empty(t, errs)
	require.Equal(t, 1, strings.Count(out, "checksum of file 3"), out)
	require.Contains(t, out, "fail  images: layer 9 cannot be used: checksum of file 3 is wrong; it is fetched again now and then\n      cure: fetch it by hand: ctr -n x content fetch y\n")
	require.Equal(t, 1, strings.Count(out, "no space left on device"), out)
	require.Contains(t, out, "warn  daemon: work on layer 7 has failed and is tried again: no space left on device\n      cure: make room\n")
	require.NotContains(t, out, "stand on one filesystem")
	require.Contains(t, out, "fail  regions: no container with a region starts: regions are not served: sweep")
	require.NotContains(t, out, "containers ask for regions")
	require.NotContains(t, out, "containers cannot ask for regions")
	require.Contains(t, out, "warn  daemon: starts are not traced")
}

// A lack of room that the daemon and doctor both see is said once: by the daemon, which knows the whole reserve, or by doctor
// where it is a failure. What the daemon alone says stays.
func TestDoctorSaysAShortageOnce(t *testing.T) {
	warn := func(area, text string) doctor.Finding {
		return doctor.Finding{Area: area, Level: doctor.Warn, Text: text, Cure: "make room"}
	}
	fail := func(area, text string) doctor.Finding {
		return doctor.Finding{Area: area, Level: doctor.Fail, Text: text, Cure: "make room"}
	}
	inodes := warn("daemon", "NVM has too few inodes: 60 of 1000 free, the reserve is 50, so that layers and writable directories go to HDD")
	same := inodes
	same.Area = "nvm"
	other := warn("nvm", "NVM is full: 1 B free, the reserve is 2 B, so that layers and writable directories go to HDD")
	full := fail("hdd", "HDD is full: no pull succeeds")
	ok := doctor.Finding{Area: "nvm", Level: doctor.OK, Text: "ext4 is free of faults"}
	for _, x := range []struct{ daemon, host, want []doctor.Finding }{
		{[]doctor.Finding{inodes}, []doctor.Finding{ok, same}, []doctor.Finding{inodes, ok}},
		{[]doctor.Finding{inodes}, []doctor.Finding{ok, other}, []doctor.Finding{inodes, ok, other}},
		{nil, []doctor.Finding{same}, []doctor.Finding{same}},
		{[]doctor.Finding{warn("daemon", full.Text), inodes}, []doctor.Finding{full}, []doctor.Finding{inodes, full}},
	} {
		require.Equal(t, x.want, (&daemon{findings: x.daemon}).beside(x.host))
	}
}

// withoutRegions is a daemon that could not open its store of regions.
type withoutRegions struct{ backend }

func (b *withoutRegions) Status(ctx context.Context) (*control.StatusResponse, error) {
	s, err := b.backend.Status(ctx)
	s.Warnings = append(s.Warnings, "regions are not served: read store of regions: input/output error")
	return s, err
}

// Where no regions are served, no container with one starts: that is a failure, said once, and nothing of regions is ok.
func TestDoctorWithoutRegions(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("doctor mounts, which needs root")
	}
	c := config.Default()
	c.Root, c.NVMRoot = filepath.Join(t.TempDir(), "hdd"), filepath.Join(t.TempDir(), "nvm")
	socket := serve(t, &withoutRegions{}, c)
	code, out, _ := ctl(t, "doctor", "--address", socket, "--containerd", "", "--containerd-config", containerdConfig(t, c))
	require.Equal(t, exitFailure, code)
	require.Contains(t, out, "fail  regions: no container with a region starts: regions are not served: read store of regions: input/output error\n      cure: ")
	require.Equal(t, 1, strings.Count(out, "not served"))
	require.NotContains(t, out, "ok    regions")
	code, out, _ = ctl(t, "status", "--address", socket)
	require.Zero(t, code)
	require.Equal(t, 1, strings.Count(out, "not served"))
}

func TestDoctorWithoutDaemon(t *testing.T) {
	c := config.Default()
	c.Root, c.NVMRoot = filepath.Join(t.TempDir(), "hdd"), filepath.Join(t.TempDir(), "nvm")
	file := filepath.Join(t.TempDir(), "nhybrid.toml")
	b, err := c.Marshal()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, b, 0o600))
	code, out, _ := ctl(t, "doctor", "--address", "/nowhere/s", "--config", file, "--containerd", "", "--containerd-config", "/nowhere/config.toml")
	require.Equal(t, exitFailure, code)
	require.Contains(t, out, "fail  daemon: cannot reach the daemon at /nowhere/s")
	require.Contains(t, out, "ok    config: the configuration file is good")
	require.Contains(t, out, "fail  containerd: read containerd's configuration: open /nowhere/config.toml: no such file or directory")

	require.NoError(t, os.WriteFile(file, []byte("rot = 1"), 0o600))
	code, out, _ = ctl(t, "doctor", "--address", "/nowhere/s", "--config", file)
	require.Equal(t, exitFailure, code)
	require.Contains(t, out, `unknown key "rot"; did you mean "root"?`)
	require.Equal(t, 1, strings.Count(out, "fail  config"))
}
