// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

func TestGuarantee(t *testing.T) {
	pmem, disk := host.Dir{Source: "/dev/pmem0"}, host.Dir{Source: "/dev/nvme0n1"}
	for _, x := range []struct {
		info scmlib.Info
		dir  host.Dir
		want string
	}{
		{scmlib.Info{Durability: scmlib.PowerLoss, Granularity: scmlib.CacheLine, DAX: true, MapSync: true, Instruction: "clwb"}, pmem, "ok regions are persistent memory (cache line by clwb)"},
		{scmlib.Info{Durability: scmlib.PowerLoss, Granularity: scmlib.Byte, DAX: true, MapSync: true, EADR: true}, pmem, "ok regions are persistent memory (byte, a fence is enough)"},
		{scmlib.Info{Durability: scmlib.PowerLoss, Granularity: scmlib.Page}, disk, "ok regions survive loss of power, written back by msync"},
		{scmlib.Info{Durability: scmlib.PowerLoss, Granularity: scmlib.Page}, pmem, "warn regions are files in the page cache"},
		{scmlib.Info{Durability: scmlib.PowerLoss, Granularity: scmlib.Page, DAX: true}, disk, "warn NVM has DAX, but"},
		{scmlib.Info{Durability: scmlib.ProcessCrash, Granularity: scmlib.Page}, disk, "warn what programs persist in regions survives a process crash and nothing more"},
		{scmlib.Info{Durability: scmlib.ProcessCrash, Granularity: scmlib.CacheLine}, disk, "warn what programs persist"},
	} {
		f := &findings{area: "regions"}
		guarantee(f, x.info, x.dir)
		require.Len(t, f.all, 1)
		require.Equal(t, f.all[0].Level == OK, f.all[0].Cure == "")
		line := string(f.all[0].Level) + " " + f.all[0].Text
		require.True(t, strings.HasPrefix(line, x.want), line)
	}
}

// A region is really made, and nothing stays of it.
func TestRegionsAreTried(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.SCM.CDISpec = ""
	all := Regions(host.Dir{Path: dir, Source: "/dev/x"}, c, true)
	require.Len(t, all, 1)
	require.Regexp(t, "msync|memory of the system|persistent memory", all[0].Text)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	require.Equal(t, Fail, Regions(host.Dir{Path: filepath.Join(dir, "gone")}, c, true)[0].Level)
	for _, f := range Regions(host.Dir{Path: dir, Source: "/dev/x"}, c, false) {
		require.NotEqual(t, OK, f.Level, "none are served, so nothing of them is ok: %s", f.Text)
	}
	c.SCM.Enabled = false
	require.Equal(t, OK, Regions(host.Dir{Path: filepath.Join(dir, "gone")}, c, true)[0].Level)
}

func TestSpecification(t *testing.T) {
	dir := t.TempDir()
	hook := filepath.Join(dir, "hook")
	require.NoError(t, os.WriteFile(hook, []byte("#!/bin/sh\n"), 0o755))
	c := config.Default()
	c.SCM.CDISpec = filepath.Join(dir, "scm.json")
	look := func() string {
		f := &findings{area: "regions"}
		specification(f, c)
		require.Len(t, f.all, 1)
		return string(f.all[0].Level) + " " + f.all[0].Text
	}
	require.Contains(t, look(), "warn containers cannot ask for regions")
	spec := region.CDI{Path: c.SCM.CDISpec, Hook: hook, Socket: c.SCM.Address, Sizes: []int64{1 << 20}}
	require.NoError(t, spec.Write([]string{"orders"}))
	require.Equal(t, "ok containers ask for regions by 3 devices of kind nhybrid.io/scm", look())
	c.SCM.Address = "/run/other.sock"
	require.Contains(t, look(), "fail")
	c.SCM.Address = spec.Socket
	require.NoError(t, os.Remove(hook))
	require.Contains(t, look(), "fail no container with a region starts")
	require.NoError(t, os.WriteFile(c.SCM.CDISpec, []byte("{"), 0o600))
	require.Contains(t, look(), "warn containers cannot ask for regions")
}

func TestPodsAndNRI(t *testing.T) {
	const nri = "\n[plugins.'io.containerd.nri.v1.nri']\n"
	const validator = "\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n"
	for more, want := range map[string]string{
		"":                                        "",
		nri + "disable = true":                    "NRI is turned off",
		nri + "disable = false":                   "",
		nri + "disable_connections = true":        "NRI takes no plugins from outside",
		nri + "socket_path = '/run/other.sock'":   `NRI is at "/run/other.sock" and nhybrid looks at "/var/run/nri/nri.sock"`,
		nri + "socket_path = '/run/nri/nri.sock'": "",
		validator + "enable = true\nreject_oci_hook_adjustment = true":  "NRI refuses the hook",
		validator + "enable = false\nreject_oci_hook_adjustment = true": "",
		validator + "enable = true\nrequired_plugins = ['nhybrid-scm']": "",
	} {
		found := strings.Join(bad(t, look(t, write(t, good+more))), "\n")
		if want == "" {
			require.Empty(t, found, more)
		} else {
			require.Contains(t, found, "warn CRI: annotations of pods get no regions, "+want)
		}
	}
	off := strings.Replace(good, "version = 4", "version = 4\ndisabled_plugins = ['io.containerd.nri.v1.nri']", 1)
	require.Contains(t, strings.Join(bad(t, look(t, write(t, off))), "\n"), "NRI is turned off")
	ok := false
	for _, f := range look(t, write(t, good)) {
		ok = ok || f.Text == "CRI: annotations of pods ask for regions by NRI at /var/run/nri/nri.sock"
	}
	require.True(t, ok)
}

func TestPodsAndCDI(t *testing.T) {
	const runtime = "\n[plugins.'io.containerd.cri.v1.runtime']\n"
	for more, want := range map[string]string{
		"":                                       "",
		runtime + "cdi_spec_dirs = ['/x']":       `"/etc/cdi" is not searched`,
		runtime + "cdi_spec_dirs = []":           `"/etc/cdi" is not searched`,
		runtime + "enable_cdi = false":           "CDI is turned off",
		runtime + "cdi_spec_dirs = ['/etc/cdi']": "",
	} {
		found := strings.Join(bad(t, look(t, write(t, good+more))), "\n")
		if want == "" {
			require.Empty(t, found, more)
		} else {
			require.Contains(t, found, want)
		}
	}
}
