// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// node is a configuration for directories of the test, with a hook that can be run.
func node(t *testing.T) config.Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root is answered")
	}
	dir, err := os.MkdirTemp("", "scm") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	c := config.Default()
	c.Root, c.NVMRoot = filepath.Join(dir, "hdd"), filepath.Join(dir, "nvm")
	require.NoError(t, os.Mkdir(c.Root, 0o700))
	require.NoError(t, os.Mkdir(c.NVMRoot, 0o700))
	c.Containerd.Address = filepath.Join(dir, "none.sock")
	c.SCM.Address, c.SCM.CDISpec, c.SCM.Hook = filepath.Join(dir, "scm.sock"), filepath.Join(dir, "cdi", "scm.json"), filepath.Join(dir, "hook")
	c.SCM.Pool = config.List{{Name: "192k", Value: "1"}}
	require.NoError(t, os.WriteFile(c.SCM.Hook, []byte("#!/bin/sh\n"), 0o755))
	require.NoError(t, c.Check())
	return c
}

func serveRegions(t *testing.T, c config.Config) *regions {
	t.Helper()
	r := &regions{stop: func() {}}
	r.begin(t.Context(), c, sockets{}, func() int64 { return 0 })
	t.Cleanup(func() { r.stop() })
	return r
}

func create(c config.Config, name string) error {
	_, err := api.Call(c.SCM.Address, region.OpCreate, region.Args{Namespace: "default", Region: name, Create: region.CreateOptions{Size: 64 << 10}}, nil)
	return err
}

func TestRegionsAreServed(t *testing.T) {
	c := node(t)
	require.NoError(t, os.MkdirAll(filepath.Join(c.Root, "spool", "left"), 0o700))
	r := serveRegions(t, c)
	require.Empty(t, r.warnings())
	require.NoDirExists(t, filepath.Join(c.Root, "spool", "left"))
	require.NoError(t, create(c, "orders"))
	spec, err := os.ReadFile(c.SCM.CDISpec)
	require.NoError(t, err)
	for _, device := range []string{`"16g"`, `"192k"`, `"image"`, `"orders"`, c.SCM.Hook, c.SCM.Address} {
		require.Contains(t, string(spec), device)
	}
	st, err := os.Stat(c.SCM.Address)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())

	// Another daemon cannot have them, and harms neither.
	other := c
	other.SCM.Address += "2"
	require.Contains(t, serveRegions(t, other).warnings()[0], "another process has it")
	require.NoError(t, create(c, "more"))

	r.stop()
	require.ErrorContains(t, create(c, "late"), "it does not run")
	// What cannot be read is told, and the rest served.
	meta := filepath.Join(c.NVMRoot, "r", "k", "volume+default+more", "meta")
	require.NoError(t, os.WriteFile(meta, []byte("{"), 0o600))
	again := serveRegions(t, c)
	require.Len(t, again.warnings(), 1)
	require.Contains(t, again.warnings()[0], "is left alone")
	require.ErrorContains(t, create(c, "orders"), "already exists")
}

// Volumes that went with their NVM are named, until they are made anew or somebody has read it.
func TestLostVolumesAreNamed(t *testing.T) {
	c := node(t)
	r := serveRegions(t, c)
	for _, name := range []string{"orders", "users", "kept"} {
		require.NoError(t, create(c, name))
	}
	require.Empty(t, r.warnings())
	r.stop()
	for _, name := range []string{"orders", "users"} {
		require.NoError(t, os.RemoveAll(filepath.Join(c.NVMRoot, "r", "k", "volume+default+"+name)))
	}
	r = serveRegions(t, c)
	require.Len(t, r.warnings(), 1)
	require.Contains(t, r.warnings()[0], "volumes orders, users stood on an NVM device that was lost")
	require.NoError(t, create(c, "orders"))
	require.Contains(t, r.warnings()[0], "volumes users stood")
	r.stop()
	r = serveRegions(t, c) // it is said after the next start, too
	require.Contains(t, r.warnings()[0], "volumes users stood")
	require.NoError(t, os.Remove(filepath.Join(c.Root, "volumes.lost")))
	require.Empty(t, r.warnings())
	r.stop()
	require.Empty(t, serveRegions(t, c).warnings())
}

// A device whose hook is missing would stop containers, without a word of why.
func TestNoHookNoSpecification(t *testing.T) {
	c := node(t)
	require.NoError(t, os.Remove(c.SCM.Hook))
	r := serveRegions(t, c)
	require.Len(t, r.warnings(), 1)
	require.Contains(t, r.warnings()[0], "containers cannot ask for regions")
	require.NoFileExists(t, c.SCM.CDISpec)
	require.NoError(t, create(c, "orders"), "processes of the host can")
	// It comes, and with the next change of volumes the specification.
	require.NoError(t, os.WriteFile(c.SCM.Hook, []byte("#!/bin/sh\n"), 0o755))
	require.NoError(t, create(c, "more"))
	require.Empty(t, r.warnings())
	require.FileExists(t, c.SCM.CDISpec)
}

func TestRegionsAreNotServed(t *testing.T) {
	c := node(t)
	l, err := net.Listen("unix", c.SCM.Address)
	require.NoError(t, err)
	defer l.Close()
	require.Contains(t, serveRegions(t, c).warnings()[0], "regions are not served: socket")
	c.SCM.Enabled = false
	require.Empty(t, serveRegions(t, c).warnings())
	require.NoDirExists(t, filepath.Join(c.NVMRoot, "r"))
}

func TestOptions(t *testing.T) {
	c := node(t)
	c.SCM.Quotas = config.List{{Name: "a", Value: "1%"}}
	o, err := options(c)
	require.NoError(t, err)
	require.NotZero(t, o.Limit)
	require.InDelta(t, float64(o.Limit), float64(o.Headroom)*10, 100, "half, and a twentieth")
	require.InDelta(t, float64(o.Limit), float64(o.Quotas["a"].Bytes)*50, 100)
	require.Equal(t, map[int64]int{192 << 10: 1}, o.Pool)
	c.SCM.Limit, c.SCM.Reserve, c.Placement.NVMReserve = config.Space{}, config.Space{Percent: 60}, config.Space{Percent: 50}
	_, err = options(c)
	require.ErrorContains(t, err, "nothing would be left for images")
	c.NVMRoot += "/none"
	_, err = options(c)
	require.ErrorContains(t, err, "ask for the size of NVM")
}
