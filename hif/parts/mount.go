// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Mount mounts the image at path on point, a directory that is made where it is missing; packPath is where the pack of a
// layer stands, which holds the cold chunks. The image is verified first, and that the packs are there and large enough. What
// is mounted on point already is replaced without a moment in between, and lives on for the overlays that have it.
//
// Errors: those of [Read]; errdefs.ErrNotFound and ErrFailedPrecondition for a pack; errdefs.ErrNotImplemented where
// the kernel cannot, or not on this filesystem.
func Mount(path, point string, packPath func(layer uint64) string) error {
	mnt, err := open(path, packPath)
	if err != nil {
		return fmt.Errorf("mount parts image %q: %w", path, err)
	}
	defer unix.Close(mnt)
	if err := os.MkdirAll(point, 0o700); err != nil {
		return fmt.Errorf("mount parts image: %w", err)
	}
	if err := erofs.Attach(mnt, point); err != nil {
		return fmt.Errorf("mount parts image %q on %q: %w", path, point, err)
	}
	return nil
}

// Detach takes the mount on point away, if there is one. Overlays that have it keep it. The bare directory stays: a container
// that was told to mount it finds no parts there, and does not fail.
func Detach(point string) error {
	for Mounted(point) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount parts at %q: %w", point, err)
		}
	}
	return nil
}

// Unmount is Detach, and removes the directory. No container may be told to mount it any more.
func Unmount(point string) error {
	if err := Detach(point); err != nil {
		return err
	}
	if err := os.Remove(point); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// Mounted tells whether an EROFS image is mounted on point; the directory below is never on one.
func Mounted(point string) bool { return erofs.Mounted(point) }

// Current tells whether what is mounted on point are the parts in the image at path. It is false where the kernel does not
// tell (before Linux 6.9).
func Current(path, point string) bool {
	f, err := os.Open(path)
	if err != nil || !Mounted(point) {
		return false
	}
	defer f.Close()
	uuid, err := erofs.UUID(f)
	if err != nil {
		return false
	}
	dir, err := unix.Open(point, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	var got struct {
		len  byte
		uuid [16]byte
	}
	const getUUID = 0x80111500 // FS_IOC_GETFSUUID, _IOR(0x15, 0, struct fsuuid2)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dir), getUUID, uintptr(unsafe.Pointer(&got)))
	return errno == 0 && int(got.len) == len(uuid) && got.uuid == uuid
}

// open verifies the image and its devices, and returns a mount that is attached nowhere.
//
// Without directio (Linux 6.15): pages are cached a second time below, but what [ReadAhead] has brought there costs a copy
// instead of a request to the device, and the pack on HDD has a read-ahead of its own.
func open(path string, packPath func(layer uint64) string) (mnt int, err error) {
	image, err := os.Open(path)
	if err != nil {
		return -1, err
	}
	defer image.Close()
	c, err := readFrom(image)
	if err != nil {
		return -1, err
	}
	devices, err := c.openPacks(packPath)
	if err != nil {
		return -1, err
	}
	defer closeAll(devices)
	mnt, _, err = erofs.Mount(image, devices, c.ReadAhead())
	return mnt, err
}
