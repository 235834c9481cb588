//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// A device fails in a pull, and is well again. The pull fails in one line, or it does not; whatever was stored before can be
// used, nothing that is torn is served, and the same pull succeeds afterwards.
func TestDeviceThatFails(t *testing.T) {
	t.Parallel()
	const hdd, nvm = 0, 1
	const large = 64 << 10 // data: ext4 writes metadata in smaller requests
	for name, c := range map[string]struct {
		disk   int
		policy string
		fault  hddsim.Fault
	}{
		"HDD writes":      {hdd, "hdd", hddsim.Fault{Ops: hddsim.Writes, Least: large}},
		"HDD writes once": {hdd, "hdd", hddsim.Fault{Ops: hddsim.Writes, Least: large, Times: 1}},
		"HDD flushes":     {hdd, "hdd", hddsim.Fault{Ops: hddsim.Flushes}},
		"NVM writes":      {nvm, "nvm", hddsim.Fault{Ops: hddsim.Writes, Least: large}},
		"NVM writes once": {nvm, "nvm", hddsim.Fault{Ops: hddsim.Writes, Least: large, Times: 1}},
		"NVM flushes":     {nvm, "nvm", hddsim.Fault{Ops: hddsim.Flushes}},
		"NVM flush once":  {nvm, "nvm", hddsim.Fault{Ops: hddsim.Flushes, Skip: 3, Times: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			var disks [2]*hddsim.Disk
			for i, name := range []string{"hdd", "nvm"} {
				disk, err := hddsim.Start(ctx, hddsim.Options{
					Dir: filepath.Join(t.TempDir(), name), Size: 128 << 20, Model: &hddsim.Model{}, NoJournal: true,
				})
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, disk.Close()) })
				disks[i] = disk
			}
			r := newRig(t, rig.Options{
				HDD: filepath.Join(disks[hdd].Mountpoint(), "nhybrid"), NVM: filepath.Join(disks[nvm].Mountpoint(), "nhybrid"),
				DaemonArgs: append([]string{"--set", "placement.policy=" + c.policy}, calm...),
			})
			_, err := r.PushTiny(ctx, "other:1", app(1))
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "other:1"))
			inOrder(t, r)
			spec := image.TinySpec{Seed: 2, Runnable: true, Layers: []int64{1 << 20, 1 << 20, 1 << 20}}
			_, err = r.PushTiny(ctx, "app:1", spec)
			require.NoError(t, err)

			require.NoError(t, disks[c.disk].SetFault(c.fault))
			_, err = r.Ctr(ctx, "images", "pull", "--plain-http", r.Ref("app:1"))
			if err != nil {
				require.Equal(t, 1, strings.Count(err.Error(), "ctr: "), "%v", err)
				require.NotContains(t, said(err), "\n")
				require.Contains(t, said(err), "input/output error")
			}
			await(t, func(context.Context) error {
				n, err := disks[c.disk].Counters()
				if err == nil && n.Struck == 0 {
					err = errors.New("nothing has failed yet")
				}
				return err
			})
			require.NoError(t, disks[c.disk].SetFault(hddsim.Fault{}))

			require.Equal(t, contentSum(t, 1, 3), run(t, r, "other:1", "sh", "-c", allContent))
			require.NoError(t, r.Pull(ctx, "app:1"))
			want := sumOf(t, spec)
			for range 2 {
				require.Equal(t, want, run(t, r, "app:1", "sh", "-c", allContent))
				inOrder(t, r)
				// From the devices, and by a daemon that has seen nothing.
				require.NoError(t, r.Daemon.Stop())
				reboot(t, r)
				uncache(t, r)
				require.NoError(t, r.Daemon.Start(ctx))
				await(t, reachable(r))
			}
			removeImage(t, r, "other:1")
			removeImage(t, r, "app:1")
			collect(t, r, "app:1")
		})
	}
}

// The HDD cannot be read for a while. Containers get the error, nothing is taken for damaged, and all is as it was afterwards,
// though the content store has no blob any more.
func TestHDDThatCannotBeRead(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	disk, err := hddsim.Start(ctx, hddsim.Options{Dir: filepath.Join(t.TempDir(), "disk"), Size: 128 << 20, Model: &hddsim.Model{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, disk.Close()) })
	r := newRig(t, rig.Options{
		HDD: filepath.Join(disk.Mountpoint(), "nhybrid"),
		// A prediction would make the view anew before the disk fails.
		DaemonArgs: append([]string{"--set", "placement.policy=hdd", "--set", "hot.predict=off"}, calm...),
	})
	spec := image.TinySpec{Seed: 4, Runnable: true, Layers: []int64{1 << 20, 1 << 20}}
	img, err := r.PushTiny(ctx, "app:1", spec)
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	inOrder(t, r)
	forgetBlobs(t, r, blobs(t, img)...)
	for _, viewGone := range []bool{false, true} {
		require.NoError(t, r.Daemon.Stop())
		reboot(t, r)
		if viewGone {
			require.NoError(t, os.Remove(oneView(t, r)))
		}
		require.NoError(t, r.Daemon.Start(ctx))
		await(t, reachable(r))
		uncache(t, r)
		require.NoError(t, disk.SetFault(hddsim.Fault{Ops: hddsim.Reads}))
		_, err = r.RunContainer(ctx, "app:1", "c", "sh", "-c", allContent)
		require.Error(t, err)
		if viewGone { // where the view is there, the program cannot be read, and the kernel may also kill it
			require.Contains(t, strings.ToLower(err.Error()), "input/output error")
		}
		require.NoError(t, disk.SetFault(hddsim.Fault{}))
		require.Equal(t, sumOf(t, spec), run(t, r, "app:1", "sh", "-c", allContent))
		inOrder(t, r)
	}
	require.False(t, inLog(r, "is damaged"))
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

// NVM gets full in the middle of a layer that is decided for it: the rest goes to the HDD, and the pull succeeds.
func TestNVMFullInALayer(t *testing.T) {
	t.Parallel()
	for name, fill := range map[string]func(t *testing.T, dir string) error{
		"bytes": func(t *testing.T, dir string) error {
			f, err := os.Create(filepath.Join(dir, "ballast"))
			require.NoError(t, err)
			defer f.Close()
			for size := 1 << 20; ; { // down to single blocks
				if _, err = f.Write(make([]byte, size)); err == nil {
					continue
				}
				if size /= 16; size < 4096 {
					return err
				}
			}
		},
		"inodes": func(_ *testing.T, dir string) error {
			for i := 0; ; i++ {
				f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
				if err != nil {
					return err
				}
				f.Close()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{NVMSize: 256 << 20, DaemonArgs: append([]string{
				"--set", "placement.policy=boundary=0", "--set", "placement.nvm_reserve=0",
			}, calm...)})
			spec := image.TinySpec{Seed: 3, Runnable: true, Layers: []int64{half, 8 << 20}}
			img, err := r.PushTiny(ctx, "app:1", spec)
			require.NoError(t, err)
			digest := blobs(t, img)[2]
			release := r.Link.Hold(digest, 4<<20)
			defer release()
			wait := start(func() error { return r.Pull(ctx, "app:1") })
			awaitStored(t, r, but(blobs(t, img), 2)...)
			await(t, func(context.Context) error { // what has arrived of the layer stands on NVM
				files, err := filepath.Glob(filepath.Join(r.NVM, "d", "*", "*", "*"))
				if err == nil && len(files) < 1+8+3 { // data files of busybox, of the small layer, of this one
					err = fmt.Errorf("%d files", len(files))
				}
				return err
			})
			ballast := filepath.Join(filepath.Dir(r.NVM), "ballast")
			require.NoError(t, os.Mkdir(ballast, 0o700))
			require.ErrorIs(t, fill(t, ballast), unix.ENOSPC)
			release()
			require.NoError(t, wait())
			require.Equal(t, sumOf(t, spec), run(t, r, "app:1", "sh", "-c", allContent))
			layers := inspect(t, r, "app:1")
			require.Positive(t, layers[2].NVMBytes)
			require.Less(t, layers[2].NVMBytes, int64(8<<20))
			require.NoError(t, os.RemoveAll(ballast))
			inOrder(t, r)
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
		})
	}
}
