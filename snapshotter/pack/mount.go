// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/internal/loop"
)

// ViewReadAhead is how far the kernel reads ahead on a view, in bytes: as on a disk.
const ViewReadAhead = 128 << 10

// MountView mounts the view at path read-only on point, a directory that is made
// where it is missing. packs are the paths of the packs of [ViewDevices], in that
// order. With useLoop each file is attached to a loop device, for kernels and
// filesystems from which EROFS mounts no file; all views share the device of a
// pack, and it goes with the last mount.
//
// The kernel reads ahead by [ViewReadAhead], which can be changed by what is returned.
//
// The caller mounts and unmounts a point from one goroutine at a time. Errors:
// those of [VerifyView]; errdefs.ErrInvalidArgument for a wrong number of packs;
// errdefs.ErrAlreadyExists if a view is mounted there; errdefs.ErrNotImplemented
// where the kernel cannot.
func MountView(path, point string, packs []string, useLoop bool) (erofs.ReadAhead, error) {
	mnt, ahead, err := openView(path, packs, useLoop)
	if err != nil {
		return ahead, fmt.Errorf("mount view %q: %w", path, err)
	}
	defer unix.Close(mnt)
	if err := os.MkdirAll(point, 0o700); err != nil {
		return ahead, fmt.Errorf("mount view %q: %w", path, err)
	}
	if Mounted(point) {
		return ahead, fmt.Errorf("mount view %q: a view is mounted on %q: %w", path, point, errdefs.ErrAlreadyExists)
	}
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, point, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return ahead, fmt.Errorf("mount view %q on %q: %w", path, point, err)
	}
	return ahead, nil
}

// RemountView puts a new mount of the view at path in place of the one on point, for
// packs that have been replaced. There is no moment without a view, since a container
// may have been told to mount it. Overlays that have the old one keep it. Errors:
// those of [MountView].
func RemountView(path, point string, packs []string, useLoop bool) (erofs.ReadAhead, error) {
	mnt, ahead, err := openView(path, packs, useLoop)
	if err != nil {
		return ahead, fmt.Errorf("mount view %q anew: %w", path, err)
	}
	defer unix.Close(mnt)
	if err := erofs.Attach(mnt, point); err != nil {
		return ahead, fmt.Errorf("mount view %q anew on %q: %w", path, point, err)
	}
	return ahead, nil
}

// openView returns a mount that is attached nowhere.
func openView(path string, packs []string, useLoop bool) (mnt int, ahead erofs.ReadAhead, err error) {
	files := make([]*os.File, 0, 1+len(packs))
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	image, err := os.Open(path)
	if err != nil {
		return -1, ahead, err
	}
	files = append(files, image)
	layers, err := viewDevices(image)
	if err != nil {
		return -1, ahead, err
	}
	if len(layers) != len(packs) {
		return -1, ahead, fmt.Errorf("it has %d devices, %d packs are given: %w", len(layers), len(packs), errdefs.ErrInvalidArgument)
	}
	for i, pack := range packs {
		f, err := os.Open(pack)
		if err != nil {
			return -1, ahead, fmt.Errorf("pack of layer %d: %w", layers[i], err)
		}
		files = append(files, f)
	}
	if !useLoop {
		return erofs.Mount(image, files[1:], ViewReadAhead)
	}
	for i, f := range files {
		device, err := loop.Share(f)
		if err != nil {
			return -1, ahead, err
		}
		f.Close()
		files[i] = device
	}
	return erofs.Mount(files[0], files[1:], ViewReadAhead)
}

// UnmountView takes the view mounted on point away, if there is one, and the
// directory. Overlays that have the view keep it.
func UnmountView(point string) error {
	for Mounted(point) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount view at %q: %w", point, err)
		}
	}
	if err := os.Remove(point); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// Mounted reports whether a view is mounted on point.
func Mounted(point string) bool { return erofs.Mounted(point) }
