//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// CRI mounts the root filesystem of a container to copy what the image has in a volume, and unmounts it. The unmounting
// of a writable overlay writes back all that is dirty on the filesystem of its upper directory.
func TestVolumeSyncsNothing(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	disk, err := rig.NewNVM(ctx, filepath.Join(t.TempDir(), "disk"), 256<<20)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, disk.Close()) })
	hdd := filepath.Join(disk.Mountpoint(), "hdd")
	require.NoError(t, os.Mkdir(hdd, 0o711))
	r := newRig(t, rig.Options{CRI: true, HDD: hdd, DaemonArgs: []string{"--set", "snapshot.upper_tier=hdd"}})

	img, err := image.Busybox()
	require.NoError(t, err)
	img, err = mutate.Config(img, v1.Config{Volumes: map[string]struct{}{"/volume": {}}, Env: []string{"PATH=/bin"}})
	require.NoError(t, err)
	img, err = mutate.Append(img, mutate.Addendum{MediaType: types.OCILayer, Layer: ofFiles(t,
		image.Entry{Header: tar.Header{Name: "volume/", Typeflag: tar.TypeDir, Mode: 0o755}},
		image.Entry{Header: tar.Header{Name: "volume/user", Mode: 0o600, Uid: 1000, Gid: 1001}, Data: []byte("u")})})
	require.NoError(t, err)
	require.NoError(t, r.Push(ctx, "app:1", img))
	_, err = r.Crictl(ctx, "pull", r.Ref("app:1"))
	require.NoError(t, err)
	pod, err := r.Pod(ctx, "pod")
	require.NoError(t, err)
	t.Cleanup(func() { _, err = r.Crictl(soon(t), "rmp", "-f", pod) })
	settled(t, r)

	// What is dirty for long is written by the kernel in any case (vm.dirty_expire_centisecs): such a try says nothing.
	const expire = 15 * time.Second
	for i := 0; ; i++ {
		began := time.Now()
		dirty := filepath.Join(disk.Mountpoint(), "dirty")
		require.NoError(t, os.WriteFile(dirty, make([]byte, 8<<20), 0o600))
		require.True(t, unwritten(t, dirty))
		id, err := r.Container(ctx, pod, "pod", "c"+string(rune('a'+i)), r.Ref("app:1"), "sleep", "1000")
		require.NoError(t, err)
		if stays := unwritten(t, dirty); !stays && time.Since(began) > expire {
			t.Log("too slow, again")
			require.NoError(t, os.Remove(dirty))
			continue
		} else if !stays {
			t.Fatal("creating a container with a volume has written back what is dirty on the disk")
		}
		// The container can write, and the volume has what the image has in it.
		out, err := r.Crictl(ctx, "exec", id, "sh", "-ec", "cd /volume; stat -c '%u:%g %a %n' user; cat user; echo new >/new; cat /new")
		require.NoError(t, err)
		require.Equal(t, "1000:1001 600 user\nunew", out)
		break
	}
}

// unwritten reports whether a file of ext4 has blocks that were never written back: they have no place on the device.
func unwritten(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	// linux/fiemap.h
	const fsIocFiemap, extentDelalloc = 0xc020660b, 0x4
	type extent struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
	var m struct {
		start, length       uint64
		flags, mapped, room uint32
		_                   uint32
		extents             [32]extent
	}
	m.length, m.room = 1<<40, uint32(len(m.extents))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m)))
	require.Zero(t, errno)
	for _, e := range m.extents[:m.mapped] {
		if e.flags&extentDelalloc != 0 {
			return true
		}
	}
	return false
}
