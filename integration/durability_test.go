//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// onVolatileDisk is a rig with its HDD on a disk that forgets what was not flushed.
func onVolatileDisk(t *testing.T, args ...string) (*rig.Rig, *hddsim.Disk) {
	t.Helper()
	disk, err := hddsim.Start(soon(t), hddsim.Options{
		Dir: filepath.Join(t.TempDir(), "disk"), Size: 512 << 20, Model: &hddsim.Model{}, Volatile: true,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, disk.Close()) })
	return newRig(t, rig.Options{HDD: filepath.Join(disk.Mountpoint(), "nhybrid"), DaemonArgs: args}), disk
}

// cutPower ends the disk and then the daemon, and starts the disk on what it had kept, in a new boot.
func cutPower(t *testing.T, r *rig.Rig, disk *hddsim.Disk) {
	t.Helper()
	require.NoError(t, unix.Kill(disk.Pid(), unix.SIGUSR1)) // before the daemon could write anything more
	require.NoError(t, r.Daemon.Kill())
	reboot(t, r)
	require.NoError(t, disk.PowerCut())
	require.NoError(t, disk.PowerOn(soon(t)))
	require.NoError(t, disk.SetModel(hddsim.Model{}))
	newBoot(t, r)
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, reachable(r))
}

// newBoot makes this boot of the machine another one than that in which layers were committed.
func newBoot(t *testing.T, r *rig.Rig) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(r.NVM, "nhybrid.db"), 0o600, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	require.NoError(t, db.Update(func(tx *bolt.Tx) error {
		layers := tx.Bucket([]byte("nhybrid")).Bucket([]byte("layers"))
		changed := map[string][]byte{}
		err := layers.ForEach(func(id, b []byte) error {
			var record map[string]any
			if err := json.Unmarshal(b, &record); err != nil {
				return err
			}
			if record["boot"] == nil {
				return nil // not committed
			}
			record["boot"] = "the boot before"
			b, err := json.Marshal(record)
			changed[string(id)] = b
			return err
		})
		if err != nil {
			return err
		}
		for id, b := range changed {
			if err := layers.Put([]byte(id), b); err != nil {
				return err
			}
		}
		return nil
	}))
}

// forgetBlobs removes the blobs of layers from containerd's content store.
func forgetBlobs(t *testing.T, r *rig.Rig, digests ...string) {
	t.Helper()
	for _, d := range digests {
		_, err := r.Ctr(soon(t), "content", "rm", d)
		require.NoError(t, err)
	}
}

const allContent = "cat /data/*/* | sha256sum"

// Power fails as soon as the pull is over, with everything still in the disk's cache: the layers are rebuilt from the
// content store, or, where a blob is gone, refused with what to do. Never is a file served that was not written whole.
func TestPowerCutRightAfterThePull(t *testing.T) {
	t.Parallel()
	for _, blobsGone := range []bool{false, true} {
		t.Run(fmt.Sprintf("blobs gone=%v", blobsGone), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r, disk := onVolatileDisk(t, "--set", "placement.policy=boundary=2")
			img, err := r.PushTiny(ctx, "app:1", app(1))
			require.NoError(t, err)
			digests := blobs(t, img)
			// No flush ends before the power does.
			require.NoError(t, disk.SetFault(hddsim.Fault{Ops: hddsim.Flushes, Hold: true}))
			require.NoError(t, r.Pull(ctx, "app:1"))
			require.False(t, inspect(t, r, "app:1")[0].Durable)
			if blobsGone {
				forgetBlobs(t, r, digests...)
				r.Link.SetDown(true)
			}
			cutPower(t, r, disk)
			awaitLog(t, r, "is damaged", "the machine went down before it was on the disk")
			if !blobsGone {
				require.Equal(t, contentSum(t, 1, 3), run(t, r, "app:1", "sh", "-c", allContent))
				require.Zero(t, onNVM(inspect(t, r, "app:1")[:2]))
				settled(t, r)
				for i, l := range inspect(t, r, "app:1") {
					require.True(t, l.Durable, "layer %d", i)
					require.Empty(t, l.Error)
				}
				return
			}
			_, err = r.RunContainer(ctx, "app:1", "c", "true")
			require.ErrorContains(t, err, "cannot be used")
			require.ErrorContains(t, err, "the machine went down before it was on the disk")
			require.ErrorContains(t, err, "fetch it by hand: ctr -n "+r.Namespace+" content fetch "+r.Ref("app:1"))
			require.Contains(t, inspect(t, r, "app:1")[0].Error, "the machine went down")
			// The cures cure.
			r.Link.SetDown(false)
			_, err = r.Ctr(ctx, "content", "fetch", "--plain-http", r.Ref("app:1"))
			require.NoError(t, err)
			require.Equal(t, contentSum(t, 1, 3), run(t, r, "app:1", "sh", "-c", allContent))
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
			require.NoError(t, r.Pull(ctx, "app:1"))
			require.Equal(t, contentSum(t, 1, 3), run(t, r, "app:1", "sh", "-c", allContent))
		})
	}
}

// What was durable is durable: nothing has to be rebuilt, and nothing is asked of the content store.
func TestPowerCutAfterDurable(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r, disk := onVolatileDisk(t, "--set", "placement.policy=boundary=2")
	img, err := r.PushTiny(ctx, "app:1", app(2))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	settled(t, r)
	forgetBlobs(t, r, blobs(t, img)...)
	cutPower(t, r, disk)
	require.False(t, inLog(r, "is damaged"))
	require.Equal(t, contentSum(t, 2, 3), run(t, r, "app:1", "sh", "-c", allContent))
	require.Equal(t, "hhnn", tiers(inspect(t, r, "app:1")))
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

// Power fails at some moment of a pull; whatever is there afterwards is whole.
func TestPowerCutInThePull(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r, disk := onVolatileDisk(t)
	digests, release := pushHeld(t, r, 3)
	defer release()
	wait := start(func() error { return r.Pull(ctx, "app:1") })
	awaitStored(t, r, but(digests, 2)...)
	cutPower(t, r, disk)
	release()
	if err := wait(); err != nil {
		require.NoError(t, r.Pull(ctx, "app:1"))
	}
	require.Equal(t, contentSum(t, 3, 3), run(t, r, "app:1", "sh", "-c", allContent))
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

// NVM is lost and replaced by an empty one. What had been copied to HDD is there, the rest is rebuilt from the content
// store, or refused with what to do.
func TestLossOfNVM(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ writeBack, blobsGone bool }{
		"copied, blobs gone":     {true, true},
		"not copied":             {false, false},
		"not copied, blobs gone": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: []string{
				"--set", "placement.policy=boundary=2", "--set", fmt.Sprintf("background.write_back=%v", c.writeBack),
			}})
			img, err := r.PushTiny(ctx, "app:1", app(4))
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "app:1"))
			settled(t, r)
			if c.writeBack {
				await(t, func(context.Context) error {
					for i, l := range inspect(t, r, "app:1") {
						if l.HDDBytes < l.NVMBytes {
							return fmt.Errorf("layer %d has %d of %d bytes on HDD", i, l.HDDBytes, l.NVMBytes)
						}
					}
					return nil
				})
				settled(t, r)
			}
			if c.blobsGone {
				forgetBlobs(t, r, blobs(t, img)...)
				r.Link.SetDown(true)
			}
			require.NoError(t, r.Daemon.Stop())
			reboot(t, r)
			require.NoError(t, os.RemoveAll(r.NVM))
			require.NoError(t, os.Mkdir(r.NVM, 0o711))
			require.NoError(t, r.Daemon.Start(ctx))
			require.True(t, inLog(r, "level=warning", "restoring from the copy", r.NVM, r.HDD))
			await(t, reachable(r))
			if !c.writeBack && c.blobsGone {
				_, err = r.RunContainer(ctx, "app:1", "c", "true")
				require.ErrorContains(t, err, "NVM device that was lost")
				require.ErrorContains(t, err, "fetch it by hand: ctr -n "+r.Namespace+" content fetch "+r.Ref("app:1"))
				r.Link.SetDown(false)
				removeImage(t, r, "app:1")
				awaitEmpty(t, r)
				require.NoError(t, r.Pull(ctx, "app:1"))
			}
			r.Link.SetDown(false)
			require.Equal(t, contentSum(t, 4, 3), run(t, r, "app:1", "sh", "-c", allContent))
			if c.writeBack {
				require.False(t, inLog(r, "is damaged"))
				require.Zero(t, onNVM(inspect(t, r, "app:1")))
			}
			// New layers go to the new device.
			_, err = r.PushTiny(ctx, "next:1", small(5, 3))
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "next:1"))
			require.Equal(t, "hhn", tiers(inspect(t, r, "next:1")))
			removeImage(t, r, "app:1")
			removeImage(t, r, "next:1")
			awaitEmpty(t, r)
		})
	}
}
