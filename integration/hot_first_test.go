//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// usedOnNVM is what the layers of an image and their parts take there.
func usedOnNVM(t *testing.T, r *rig.Rig, name string) (sum int64) {
	t.Helper()
	for _, l := range inspect(t, r, name) {
		sum += l.NVMBytes
	}
	images, err := filepath.Glob(filepath.Join(r.NVM, "parts", "*.erofs"))
	require.NoError(t, err)
	for _, image := range images {
		st, err := os.Stat(image)
		require.NoError(t, err)
		sum += st.Size()
	}
	return sum
}

// uncache has all layers leave the page cache, of this rig alone.
func uncache(t *testing.T, r *rig.Rig) {
	t.Helper()
	for _, root := range []string{filepath.Join(r.HDD, "p"), filepath.Join(r.NVM, "d")} {
		require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}))
	}
}

// The first start right after the pull finds the caches warm and learns exactly what it touches all the same: as little stays on
// NVM as after one that found them cold.
func TestFirstStartRightAfterThePull(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"drain", "nvm"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy="+policy, "--set", "placement.hdd_rate=1GB/s", "--set", "hot.predict=off", "--set", "hot.fetch_profiles=false")})
			k := knownImage(t, 20, 8<<20+77)
			k.push(t, r, "app:1")
			var used [2]int64
			for i, caches := range []string{"warm", "cold"} {
				require.NoError(t, r.Pull(ctx, "app:1"))
				if policy == "nvm" { // the last pages may still be under write-back; filling the holes reads the file, too
					settled(t, r)
					awaitCool(t, r, "app:1", "app/large1")
				}
				if caches == "cold" {
					settled(t, r)
					uncache(t, r)
				}
				before := recorded(t, r)
				run(t, r, "app:1", "sh", "-c", pieces)
				awaitMigration(t, r, before+1)
				p := profileOf(t, r, r.Ref("app:1"))
				found := false
				for _, f := range p.Profile.Files {
					if f.Path != "app/large1" {
						continue
					}
					found = true
					var ranges int64
					for _, rg := range f.Ranges {
						ranges += rg.Length
					}
					require.GreaterOrEqual(t, f.Touched, int64(300<<10), caches)
					require.Less(t, f.Touched, int64(2<<20), "with read-ahead; %s", caches)
					require.Less(t, ranges, int64(2<<20), caches)
				}
				require.True(t, found, "%s: %v", caches, p.paths())
				require.Less(t, inParts(t, r, "app:1", "app/large1"), int64(4<<20), caches)
				used[i] = usedOnNVM(t, r, "app:1")
				k.check(t, r, "app:1")
				awaitMigration(t, r, before+2)
				steer(t, r, "profile", "rm", r.Ref("app:1"))
				removeImage(t, r, "app:1")
				awaitEmpty(t, r)
			}
			fmt.Printf("policy %s: %d bytes on NVM after a warm first start, %d after a cold one\n", policy, used[0], used[1])
			// Less where the packs are cached: the kernel reads them with a shorter read-ahead then.
			require.LessOrEqual(t, used[0], used[1]+512<<10, "a read-ahead more or less")
		})
	}
}

// recorded is how many starts the daemon has recorded.
func recorded(t *testing.T, r *rig.Rig) int {
	t.Helper()
	var top struct {
		Sample struct {
			StartsTotal int `json:"starts_total"`
		}
	}
	ctl(t, r, &top, "top", "--once")
	return top.Sample.StartsTotal
}

// An image that was started here, removed and pulled again has its hot files on NVM when the pull returns, and no other files.
func TestHotFilesAreInPlaceAfterThePull(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=drain", "--set", "placement.hdd_rate=1GB/s", "--set", "hot.predict=off", "--set", "hot.parts=0")})
	hotImage(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	run(t, r, "app:1", "sh", "-c", "cat /app/a3 /app/b4 | md5sum; dd if=/app/large bs=64k skip=3 count=2 2>/dev/null | md5sum")
	awaitMigration(t, r, 1)
	before := fast(t, r, r.Ref("app:1"))
	require.Subset(t, before, []string{"app/a3", "app/b4", "app/large", "bin/busybox"})
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)

	steer(t, r, "migrate", "pause") // what is on NVM was brought there by the pull
	require.NoError(t, r.Pull(ctx, "app:1"))
	require.Equal(t, before, fast(t, r, r.Ref("app:1")))
	for path, f := range hotFiles(t, r, "app:1") {
		if f.Hot {
			require.EqualValues(t, f.Size, f.NVMBytes, "%s: %+v", path, f)
		}
	}
	steer(t, r, "migrate", "resume")
	await(t, func(context.Context) error {
		if s := profileOf(t, r, r.Ref("app:1")); s.Info.Known != "traced" || s.Info.Starts != 1 {
			return fmt.Errorf("%+v", s.Info)
		}
		return nil
	})
	now(t, r)
	require.Equal(t, before, fast(t, r, r.Ref("app:1")), "and there they stay")
}
