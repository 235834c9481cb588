//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
)

// migration is what nhybridctl migrate status tells.
type migration struct {
	State      string
	Why        string
	Failed     int64
	LastError  string `json:"last_error"`
	NVMUsed    int64  `json:"nvm_used"`
	NVMTotal   int64  `json:"nvm_total"`
	High, Low  int64
	Reserve    int64
	Directions []struct {
		Name      string
		FilesDone int64 `json:"files_done"`
		FilesLeft int64 `json:"files_left"`
	}
}

func migrationOf(t *testing.T, r *rig.Rig) (m migration) {
	t.Helper()
	ctl(t, r, &m, "migrate", "status")
	return m
}

// files are those done and left in a direction.
func (m *migration) files(direction string) (done, left int64) {
	for _, d := range m.Directions {
		if d.Name == direction {
			return d.FilesDone, d.FilesLeft
		}
	}
	return 0, 0
}

func steer(t *testing.T, r *rig.Rig, args ...string) {
	t.Helper()
	_, err := r.Nhybridctl(soon(t), args...)
	require.NoError(t, err)
}

// bulk pushes an image with n files of 512 KiB below /app, beside busybox.
func bulk(t *testing.T, r *rig.Rig, name string, n int) {
	t.Helper()
	var entries []image.Entry
	for i := range n {
		entries = append(entries, plain(fmt.Sprintf("app/%s/%d", name[:3], i), workload.Bytes(uint64(len(name)*1000+i), 512<<10)))
	}
	_, err := r.PushBusybox(t.Context(), name, ofFiles(t, entries...))
	require.NoError(t, err)
}

// While it is paused nothing moves, whatever is wanted; then it goes on, as slowly as it may, and at once when told so.
func TestMigrationIsSteered(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=hdd", "--set", "hot.predict=off", "--set", "hot.operations=2")})
	bulk(t, r, "app:1", 40)
	require.NoError(t, r.Pull(ctx, "app:1"))
	steer(t, r, "migrate", "pause")
	steer(t, r, "profile", "pin", r.Ref("app:1"), "**")
	var m migration
	await(t, func(context.Context) error {
		m = migrationOf(t, r)
		if _, left := m.files("up"); left < 40 || m.State != "paused" {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	require.Empty(t, fast(t, r, r.Ref("app:1")))
	_, err := r.Nhybridctl(ctx, "migrate", "now", "--wait")
	require.ErrorContains(t, err, "paused")
	require.Empty(t, fast(t, r, r.Ref("app:1")), "a pause holds")
	// It outlives no daemon, and says so by its state.
	steer(t, r, "migrate", "resume")
	await(t, func(context.Context) error {
		m = migrationOf(t, r)
		if done, _ := m.files("up"); done == 0 {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	_, left := m.files("up")
	require.Positive(t, left, "two files a second")
	steer(t, r, "migrate", "pause")
	before := fast(t, r, r.Ref("app:1"))
	require.Less(t, len(before), 40)
	steer(t, r, "migrate", "resume")
	now(t, r)
	require.Len(t, withoutUsers(fast(t, r, r.Ref("app:1"))), 41)
	m = migrationOf(t, r)
	require.Empty(t, m.LastError)
	_, left = m.files("up")
	require.Zero(t, left)
}

// On an NVM that is too small for all that is hot, what stays is bounded by the watermarks, the reserve is left alone, and
// nothing goes up and down.
func TestSmallNVM(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{NVMSize: 96 << 20, DaemonArgs: hot("--set", "placement.policy=hdd", "--set", "hot.predict=off",
		"--set", "hot.high_watermark=70", "--set", "hot.low_watermark=50", "--set", "placement.nvm_reserve=10%")})
	images := []string{"one:1", "two:1", "six:1"}
	for _, name := range images {
		bulk(t, r, name, 30)
		require.NoError(t, r.Pull(ctx, name))
		steer(t, r, "profile", "pin", r.Ref(name), "**")
	}
	settled(t, r) // views are written to NVM, too
	now(t, r)
	stands := func() (all []string) {
		for _, name := range images {
			for _, f := range fast(t, r, r.Ref(name)) {
				all = append(all, name+" "+f)
			}
		}
		return all
	}
	m := migrationOf(t, r)
	require.LessOrEqual(t, m.NVMUsed, m.Low, "nothing comes up above the low watermark")
	require.Greater(t, m.NVMUsed, m.Low-3<<20, "and up to there all")
	first := stands()
	done, _ := m.files("up")
	for range 2 {
		now(t, r)
		require.Equal(t, first, stands())
	}
	m = migrationOf(t, r)
	again, _ := m.files("up")
	require.Equal(t, done, again, "nothing moved")
	down, _ := m.files("down")
	require.Zero(t, down)

	// Others take the room: hot files leave until it is enough, and come back when it is free again.
	filler := filepath.Join(filepath.Dir(r.NVM), "filler")
	f, err := os.Create(filler)
	require.NoError(t, err)
	require.NoError(t, unix.Fallocate(int(f.Fd()), 0, 0, 20<<20))
	require.NoError(t, f.Close())
	now(t, r)
	m = migrationOf(t, r)
	require.LessOrEqual(t, m.NVMUsed, m.Low)
	short := stands()
	require.Less(t, len(short), len(first))
	require.NotEmpty(t, short)
	now(t, r)
	require.Equal(t, short, stands())
	for _, name := range images { // whatever left, all is there
		require.Equal(t, "30", run(t, r, name, "sh", "-c", "cat /app/*/* | wc -c | awk '{print $1/524288}'"))
	}
	require.NoError(t, os.Remove(filler))
	now(t, r)
	m = migrationOf(t, r)
	require.LessOrEqual(t, m.NVMUsed, m.High)
	require.Greater(t, len(stands()), len(short))
	require.Empty(t, m.LastError)
	for _, name := range images {
		removeImage(t, r, name)
	}
	awaitEmpty(t, r)
}

// An image is removed while its files come up, and while they leave.
func TestImageRemovedWhileFilesMove(t *testing.T) {
	t.Parallel()
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("up=%v", up), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			policy := map[bool]string{true: "hdd", false: "nvm"}[up]
			r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy="+policy, "--set", "hot.predict=off", "--set", "hot.operations=2")})
			bulk(t, r, "app:1", 60)
			require.NoError(t, r.Pull(ctx, "app:1"))
			direction := "up"
			if up {
				steer(t, r, "profile", "pin", r.Ref("app:1"), "**")
			} else {
				run(t, r, "app:1", "true")
				direction = "down"
			}
			await(t, func(context.Context) error {
				m := migrationOf(t, r)
				if done, left := m.files(direction); done == 0 || left == 0 {
					return fmt.Errorf("%+v", m)
				}
				return nil
			})
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
			now(t, r)
			require.Empty(t, found(t, r, "/"), "nothing comes back")
			require.NotContains(t, r.Daemon.Log(), "level=error")
			require.Empty(t, migrationOf(t, r).LastError)
			// The same image again.
			require.NoError(t, r.Pull(ctx, "app:1"))
			require.Equal(t, "31457280", run(t, r, "app:1", "sh", "-c", "cat /app/*/* | wc -c"))
		})
	}
}

// Power fails while files leave NVM for a disk that forgets what was not flushed: nothing is lost, though the content store
// has no blobs any more.
func TestPowerCutInTheMigration(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"migration begins", "pack is whole", "migration has reached its plan"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r, disk := onVolatileDisk(t, hot("--set", "placement.policy=nvm", "--set", "background.write_back=false", "--set", "hot.predict=off")...)
			k := knownImage(t, 60, 2<<20+9)
			k.push(t, r, "app:1")
			require.NoError(t, r.Pull(ctx, "app:1"))
			settled(t, r)
			c, err := r.Client()
			require.NoError(t, err)
			img, err := c.GetImage(r.Context(ctx), r.Ref("app:1"))
			require.NoError(t, err)
			digests, err := imageLayers(r.Context(ctx), img)
			require.NoError(t, err)
			forgetBlobs(t, r, digests...)
			require.NoError(t, disk.SetModel(hddsim.Model{Flush: 50 * time.Millisecond}))
			run(t, r, "app:1", "sh", "-c", "cat /app/0/d4/f14 >/dev/null")
			_, _ = r.Nhybridctl(ctx, "migrate", "now")
			awaitLog(t, r, when)
			cutPower(t, r, disk)
			require.False(t, inLog(r, "has to be rebuilt"))
			k.check(t, r, "app:1")
			awaitMigration(t, r, 1)
			now(t, r)
			k.atHome(t, r, "app:1")
			k.check(t, r, "app:1")
			settled(t, r)
			healthy(t, r)
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
		})
	}
}
