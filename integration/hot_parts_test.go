//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
)

// pieces reads 300 KiB of a large file in three places.
const pieces = "for i in 0 30 60; do dd if=/app/large1 bs=100k skip=$i count=1 2>/dev/null; done | md5sum"

// inParts is how much of a file stands on NVM in parts.
func inParts(t *testing.T, r *rig.Rig, name, path string) int64 {
	t.Helper()
	f, ok := hotFiles(t, r, name)[path]
	require.True(t, ok, path)
	require.Equal(t, "parts", f.Tier, "%+v", f)
	return f.NVMBytes
}

// checkIn has every file read in a running container, where no start is watched any more.
func checkIn(t *testing.T, r *rig.Rig, id string) {
	t.Helper()
	var result workload.Result
	require.NoError(t, json.Unmarshal([]byte(execute(t, r, id, "/app/verify", "/app/list")), &result))
	require.Empty(t, result.Errors)
}

// divided asserts that the container's overlay has the parts below it.
func divided(t *testing.T, r *rig.Rig, id string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, r.Dir+"/run/") || !strings.HasSuffix(m.Mountpoint, "/"+id+"/rootfs"), false
	})
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	require.Contains(t, mounts[0].VFSOptions, "/p/", "no parts below %s", mounts[0].Mountpoint)
}

// Of a large file only what the start touched stays on NVM; all of it can be read by containers, whatever happens to daemon
// and mounts.
func TestPartsOfALargeFile(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=nvm")})
	k := knownImage(t, 20, 8<<20+77)
	k.push(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	settled(t, r) // copying home reads the files, too
	awaitCool(t, r, "app:1", "app/large1")
	sum := run(t, r, "app:1", "sh", "-c", pieces)
	awaitMigration(t, r, 1)
	for _, f := range profileOf(t, r, r.Ref("app:1")).Profile.Files {
		if f.Path == "app/large1" {
			require.GreaterOrEqual(t, f.Touched, int64(300<<10))
			require.Less(t, f.Touched, int64(3<<20))
		}
	}
	nvm := inParts(t, r, "app:1", "app/large1")
	require.GreaterOrEqual(t, nvm, int64(300<<10))
	require.Less(t, nvm, int64(4<<20))
	used := func() (n int64) {
		for _, l := range inspect(t, r, "app:1") {
			n += l.NVMBytes
		}
		return n
	}
	require.Less(t, used(), int64(8<<20), "of layers on NVM")

	sleeper(t, r, "app:1", "s")
	awaitMigration(t, r, 2)
	divided(t, r, "s")
	checkIn(t, r, "s")
	require.Equal(t, sum, execute(t, r, "s", "sh", "-c", pieces))

	// Killed under a container, the daemon finds the parts as they are.
	require.NoError(t, r.Daemon.Kill())
	require.NoError(t, r.Daemon.Start(ctx))
	await(t, reachable(r))
	checkIn(t, r, "s")
	awaitMigration(t, r, 0)
	require.Equal(t, nvm, inParts(t, r, "app:1", "app/large1"))
	endSleeper(t, r, "s")

	// The machine went down: no mount is left.
	require.NoError(t, r.Daemon.Stop())
	reboot(t, r)
	require.NoError(t, r.Daemon.Start(ctx))
	await(t, reachable(r))
	sleeper(t, r, "app:1", "s2")
	awaitMigration(t, r, 1)
	divided(t, r, "s2")
	checkIn(t, r, "s2")
	require.Equal(t, nvm, inParts(t, r, "app:1", "app/large1"))

	// The image of parts is damaged: it is thrown away, nobody gets wrong bytes, and it is made again.
	endSleeper(t, r, "s2")
	require.NoError(t, r.Daemon.Stop())
	reboot(t, r)
	images, err := filepath.Glob(filepath.Join(r.NVM, "parts", "*.erofs"))
	require.NoError(t, err)
	require.Len(t, images, 1)
	require.NoError(t, unix.Truncate(images[0], 5000))
	require.NoError(t, r.Daemon.Start(ctx))
	await(t, reachable(r))
	require.Equal(t, sum, run(t, r, "app:1", "sh", "-c", pieces))
	awaitMigration(t, r, 1)
	require.Less(t, inParts(t, r, "app:1", "app/large1"), int64(4<<20))
	k.check(t, r, "app:1")

	require.NotEmpty(t, found(t, r, "/parts/"), "the image")
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

// awaitCool waits until files of an image on NVM have left the page cache, by which the kernel can tell what a start touches of
// them.
func awaitCool(t *testing.T, r *rig.Rig, name string, paths ...string) {
	t.Helper()
	await(t, func(context.Context) error {
		for _, path := range paths {
			f, err := os.Open(dataOnNVM(t, r, name, path))
			if err != nil {
				return err
			}
			n, err := cachedPages(f)
			if err = errors.Join(err, f.Close()); err != nil || n > 0 {
				return fmt.Errorf("%d pages of %q are cached: %w", n, f.Name(), err)
			}
		}
		return nil
	})
}

// dataOnNVM is where a file of an image stands on NVM.
func dataOnNVM(t *testing.T, r *rig.Rig, name, path string) string {
	t.Helper()
	var answer struct {
		File struct {
			Tier     string
			DataPath string `json:"data_path"`
		}
	}
	ctl(t, r, &answer, "why", r.Ref(name), "/"+path)
	require.Equal(t, "nvm", answer.File.Tier, path)
	return answer.File.DataPath
}

// cachedPages asks the kernel.
func cachedPages(f *os.File) (uint64, error) {
	var all unix.CachestatRange
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(f.Fd()), &all, &st, 0)
	return st.Cache, err
}

// found are the leftovers with a word in their path.
func found(t *testing.T, r *rig.Rig, word string) (paths []string) {
	t.Helper()
	all, err := leftovers(r)
	require.NoError(t, err)
	for _, p := range all {
		if strings.Contains(p, word) {
			paths = append(paths, p)
		}
	}
	return paths
}

// A start right after the pull finds all of the image cached, and cannot tell what of a large file it needs. The next one can.
func TestPartsAfterAWarmStart(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=nvm")})
	k := knownImage(t, 20, 8<<20+77)
	k.push(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	settled(t, r)
	awaitCool(t, r, "app:1", "app/large1")
	_, err := os.ReadFile(dataOnNVM(t, r, "app:1", "app/large1"))
	require.NoError(t, err)
	sum := run(t, r, "app:1", "sh", "-c", pieces)
	awaitMigration(t, r, 1)
	require.EqualValues(t, 8<<20+77, hotFiles(t, r, "app:1")["app/large1"].NVMBytes)
	awaitCool(t, r, "app:1", "app/large1")
	require.Equal(t, sum, run(t, r, "app:1", "sh", "-c", pieces))
	awaitMigration(t, r, 2)
	require.Less(t, inParts(t, r, "app:1", "app/large1"), int64(4<<20))
	k.check(t, r, "app:1")
}
