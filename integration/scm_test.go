//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// regionRig is a rig whose containers can have regions. Runtimes look for CDI specifications in the same directories for every rig: each has its
// kind of devices.
func regionRig(t *testing.T, more ...string) (r *rig.Rig, device func(string) string) {
	t.Helper()
	id := fmt.Sprintf("scm-%d-%s", os.Getpid(), strings.ToLower(t.Name()))
	spec, kind := filepath.Join("/var/run/cdi", id+".json"), id+".nhybrid.io/scm"
	t.Cleanup(func() { _ = os.Remove(spec) }) // there, if the daemon came so far
	r = newRig(t, rig.Options{DaemonArgs: append([]string{"--set", "scm.cdi_spec=" + spec, "--set", "scm.cdi_kind=" + kind}, more...)})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(soon(t), "busybox:1"))
	return r, func(name string) string { return kind + "=" + name }
}

type regionRecord struct {
	Kind, Name, Namespace string
	Size                  int64
}

func regionsOf(t *testing.T, r *rig.Rig) []regionRecord {
	t.Helper()
	var l struct {
		Regions []regionRecord
	}
	ctl(t, r, &l, "scm", "ls")
	return l.Regions
}

// awaitRegions waits until there are so many.
func awaitRegions(t *testing.T, r *rig.Rig, n int) {
	t.Helper()
	await(t, func(ctx context.Context) error {
		out, err := r.Nhybridctl(ctx, "scm", "ls", "--json")
		if err != nil {
			return err
		}
		if have := strings.Count(out, `"kind"`); have != n {
			return fmt.Errorf("%d regions: %s", have, out)
		}
		return nil
	})
}

func warnings(t *testing.T, r *rig.Rig) string {
	t.Helper()
	var s struct{ Warnings []string }
	ctl(t, r, &s, "status")
	return strings.Join(s.Warnings, "\n")
}

// What a container keeps in its region is there after a stop, and a restart of the daemon, until the container is removed.
func TestRegionsOfContainers(t *testing.T) {
	t.Parallel()
	r, device := regionRig(t, "--set", "scm.pool=2m=1")
	// "append" adds a byte to what the region holds, "show" tells.
	const add = `n=$(tr -d '\0' <$SCM_REGION | wc -c); printf x | dd of=$SCM_REGION bs=1 seek=$n conv=notrunc,fsync 2>/dev/null; tr -d '\0' <$SCM_REGION; stat -c ' %s' $SCM_REGION`
	out, err := r.Ctr(soon(t), "run", "--device", device("2m"), r.Ref("busybox:1"), "web", "sh", "-c", add)
	require.NoError(t, err)
	require.Equal(t, "x 2097152", out)
	require.Equal(t, []regionRecord{{"container", "web", r.Namespace, 2 << 20}}, regionsOf(t, r))
	out, err = r.Ctr(soon(t), "task", "start", "web")
	require.NoError(t, err)
	require.Equal(t, "xx 2097152", out)
	require.NoError(t, r.Daemon.Stop())
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, reachable(r))
	out, err = r.Ctr(soon(t), "task", "start", "web")
	require.NoError(t, err)
	require.Equal(t, "xxx 2097152", out)
	out, err = r.Nhybridctl(soon(t), "scm", "ls")
	require.NoError(t, err)
	require.Contains(t, out, "container/web")
	require.Contains(t, out, "2m")

	// A volume, for a container and for a program of the host, is a device at once.
	_, err = r.Nhybridctl(soon(t), "scm", "create", "orders", "--size", "1m")
	require.NoError(t, err)
	_, err = r.Nhybridctl(soon(t), "scm", "attach", "orders", "--", "sh", "-c", add)
	require.NoError(t, err)
	out, err = r.Ctr(soon(t), "run", "--rm", "--device", device("orders"), r.Ref("busybox:1"), "job", "sh", "-c", add)
	require.NoError(t, err)
	require.Equal(t, "xx 1048576", out)

	// Regions are in the books of NVM.
	out, err = r.Nhybridctl(soon(t), "top", "--once", "--json")
	require.NoError(t, err)
	require.GreaterOrEqual(t, spaceOf(t, out, "regions"), int64(3<<20))
	require.Empty(t, warnings(t, r))
	_, err = r.Ctr(soon(t), "run", "--device", device("16g"), r.Ref("busybox:1"), "large", "true")
	require.ErrorContains(t, err, "all regions together may have")
	_, err = r.Ctr(soon(t), "containers", "rm", "large")
	require.NoError(t, err)

	_, err = r.Ctr(soon(t), "containers", "rm", "web")
	require.NoError(t, err)
	awaitRegions(t, r, 1)
	_, err = r.Nhybridctl(soon(t), "scm", "rm", "orders")
	require.NoError(t, err)
	awaitRegions(t, r, 0)
}

func spaceOf(t *testing.T, sample, kind string) (sum int64) {
	t.Helper()
	var s struct {
		Sample struct {
			Tiers []struct {
				Space []struct {
					Kind  string
					Bytes int64
				}
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(sample), &s), sample)
	for _, tier := range s.Sample.Tiers {
		for _, k := range tier.Space {
			if k.Kind == kind {
				sum += k.Bytes
			}
		}
	}
	return sum
}

// The image that scm commit makes starts with the region as it was.
func TestCommitWithRegion(t *testing.T) {
	t.Parallel()
	r, device := regionRig(t)
	_, err := r.Ctr(soon(t), "run", "-d", "--cgroup", "/"+r.Namespace+"-web", "--device", device("1m"), r.Ref("busybox:1"), "web", "sh", "-c", "echo precious >$SCM_REGION; echo file >/file; exec sleep 1000")
	require.NoError(t, err)
	await(t, func(ctx context.Context) error {
		_, err := r.Ctr(ctx, "task", "exec", "--exec-id", "look", "web", "test", "-s", "/file")
		return err
	})
	out, err := r.Nhybridctl(soon(t), "scm", "commit", "web", "committed:1")
	require.NoError(t, err)
	require.Contains(t, out, "region of 1m")
	out, err = r.Ctr(soon(t), "run", "--rm", "--device", device("image"), "committed:1", "again", "sh", "-c", "head -n 1 $SCM_REGION; cat /file")
	require.NoError(t, err)
	require.Equal(t, "precious\nfile", out)
	_, err = r.Ctr(soon(t), "task", "kill", "-s", "9", "web")
	require.NoError(t, err)
}

// Room that is kept for regions is not the images', and a region finds it whatever was pulled.
func TestRoomKeptForRegions(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{NVMSize: 256 << 20, DaemonArgs: []string{"--set", "scm.limit=100MiB", "--set", "scm.reserve=100MiB", "--set", "placement.policy=nvm", "--set", "hot.migrate=false"}})
	pull := func(name string, seed uint64, bytes int64) string {
		t.Helper()
		_, err := r.PushTiny(soon(t), name, image.TinySpec{Seed: seed, Layers: []int64{bytes}})
		require.NoError(t, err)
		require.NoError(t, r.Pull(soon(t), name))
		return tiers(inspect(t, r, name))
	}
	require.Equal(t, "n", pull("first:1", 1, 2<<20))
	require.Equal(t, "h", pull("large:1", 2, 25<<20), "there is room, but not beside what is kept")
	_, err := r.Nhybridctl(soon(t), "scm", "create", "orders", "--size", "90m")
	require.NoError(t, err)
	require.Equal(t, "n", pull("second:1", 3, 5<<20), "what regions have of it is not kept a second time")
	_, err = r.Nhybridctl(soon(t), "scm", "create", "more", "--size", "10m")
	require.NoError(t, err, "nor lost to anybody else")
	_, err = r.Nhybridctl(soon(t), "scm", "create", "beyond", "--size", "1m")
	require.ErrorContains(t, err, "all regions together may have 100m")
}

// Whatever is wrong with regions, images and containers go on, and the operator is told.
func TestRegionsFailAlone(t *testing.T) {
	t.Parallel()
	r, device := regionRig(t)
	require.NoError(t, r.Daemon.Stop())
	store := filepath.Join(r.NVM, "r")
	require.NoError(t, unix.Mount("none", store, "tmpfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() { _ = unix.Unmount(store, 0) }) // was done below, unless something failed
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, reachable(r))
	require.Contains(t, warnings(t, r), "regions are not served: make store of regions")
	found, err := r.Nhybridctl(soon(t), "doctor", "--containerd-config", filepath.Join(r.Dir, "containerd.toml"), "--containerd", "")
	require.Error(t, err, "no container with a region starts: that is a failure")
	require.Equal(t, 1, strings.Count(found, "regions are not served"), found)
	require.NotContains(t, found, "ok    regions:")
	out, err := r.RunContainer(soon(t), "busybox:1", "plain", "echo", "works")
	require.NoError(t, err)
	require.Equal(t, "works", out)
	_, err = r.Ctr(soon(t), "run", "--rm", "--device", device("1m"), r.Ref("busybox:1"), "web", "true")
	require.ErrorContains(t, err, "regions are not served: make store of regions")
	_, err = r.Nhybridctl(soon(t), "scm", "ls")
	require.ErrorContains(t, err, "regions are not served: make store of regions")
	require.NoError(t, r.Daemon.Stop())
	require.NoError(t, unix.Unmount(store, 0))
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, reachable(r))
	require.Empty(t, warnings(t, r))
	out, err = r.Ctr(soon(t), "run", "--rm", "--device", device("1m"), r.Ref("busybox:1"), "web", "wc", "-c", "/dev/scm/region")
	require.NoError(t, err)
	require.Equal(t, "1048576 /dev/scm/region", out)
	awaitRegions(t, r, 0)
}

// A region that cannot be removed is left and named. It is in the way of no other, not at a restart of the daemon either.
func TestRegionThatCannotBeRemoved(t *testing.T) {
	t.Parallel()
	r, device := regionRig(t)
	data := func(id string) string { return filepath.Join(r.NVM, "r", "k", "container+"+r.Namespace+"+"+id, "data") }
	run := func(id string) {
		t.Helper()
		_, err := r.Ctr(soon(t), "run", "--device", device("1m"), r.Ref("busybox:1"), id, "true")
		require.NoError(t, err)
	}
	remove := func(id string) {
		t.Helper()
		_, err := r.Ctr(soon(t), "containers", "rm", id)
		require.NoError(t, err)
		awaitRegions(t, r, 0)
	}
	left := func() []string {
		t.Helper()
		dirs, err := filepath.Glob(filepath.Join(r.NVM, "r", "tmp", "*", "data"))
		require.NoError(t, err)
		return dirs
	}
	// What a container with CAP_LINUX_IMMUTABLE can do to its file is undone.
	run("flag")
	out, err := exec.CommandContext(soon(t), "chattr", "+i", data("flag")).CombinedOutput()
	require.NoError(t, err, "%s", out)
	remove("flag")
	await(t, func(context.Context) error {
		if l := left(); len(l) > 0 {
			return fmt.Errorf("left: %v", l)
		}
		return nil
	})
	require.Empty(t, warnings(t, r))

	run("mounted")
	require.NoError(t, unix.Mount("/dev/null", data("mounted"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { // was done below, unless something failed
		for _, path := range append(left(), data("mounted")) {
			_ = unix.Unmount(path, 0)
		}
	})
	remove("mounted")
	for _, when := range []string{"after the removal", "after a restart"} {
		await(t, func(context.Context) error {
			if w := warnings(t, r); strings.Count(w, "cannot be removed") != 1 {
				return fmt.Errorf("warnings: %s", w)
			}
			return nil
		})
		run("next")
		remove("next")
		if when == "after the removal" {
			require.NoError(t, r.Daemon.Restart(soon(t)))
			await(t, reachable(r))
		}
	}
	require.Len(t, left(), 1)
	require.NoError(t, unix.Unmount(left()[0], 0))
	require.NoError(t, r.Daemon.Restart(soon(t)))
	await(t, reachable(r))
	require.Empty(t, left())
	require.Empty(t, warnings(t, r))
}
