// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// magic is EROFS_SUPER_MAGIC_V1.
const magic = superMagic

// Mount makes a read-only mount of an image with its extra devices, all files or all loop devices, and returns its
// descriptor; it is attached nowhere. The error is of class errdefs.ErrNotImplemented where the kernel has no EROFS, or
// mounts no file as image or not on this filesystem.
//
// bytes is how far the kernel reads ahead on the mount, whatever the filesystems have on which the files stand. Where the image
// is a loop device it is that of the device.
func Mount(image *os.File, devices []*os.File, bytes int64) (mnt int, ahead ReadAhead, err error) {
	return mountReadingAhead(bytes, func() (int, error) { return mount(image, devices) })
}

// mount uses the mount API with one option after the other, since mount(2) takes a page of options at the most.
func mount(image *os.File, devices []*os.File) (mnt int, err error) {
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOSYS) {
		return -1, fmt.Errorf("this kernel has no EROFS or no fsopen(2): %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	failed := func(what string, err error) error {
		return fmt.Errorf("%s: %w%s", what, err, messages(fs))
	}
	// A read-only loop device is refused otherwise, before EROFS says that it is read-only anyway.
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return -1, failed("ro", err)
	}
	if err := unix.FsconfigSetString(fs, "source", mountName(image)); err != nil {
		return -1, failed("source", err)
	}
	for _, d := range devices {
		if err := unix.FsconfigSetString(fs, "device", byFD(d)); err != nil {
			return -1, failed("device", err)
		}
	}
	err = unix.FsconfigCreate(fs)
	if errors.Is(err, unix.ENOTBLK) {
		return -1, fmt.Errorf("this kernel mounts no EROFS from a file, or not from one on this filesystem (DAX): %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		return -1, failed("mount", err)
	}
	mnt, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return -1, failed("fsmount", err)
	}
	return mnt, nil
}

// byFD names an open file, so that the kernel opens what was verified.
func byFD(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// mountName is the source that /proc/mounts shows. The kernel takes 255 bytes of a string.
func mountName(f *os.File) string {
	if len(f.Name()) > 255 {
		return byFD(f)
	}
	return f.Name()
}

// messages are what the filesystem has to say about a failure.
func messages(fs int) string {
	var all []string
	buf := make([]byte, 1024)
	for len(all) < 8 {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		all = append(all, strings.TrimSpace(string(buf[:n])))
	}
	if len(all) == 0 {
		return ""
	}
	return " (" + strings.Join(all, "; ") + ")"
}

// Attach puts a mount on point, or in place of the EROFS image that is mounted there. Overlays that have the old one keep it.
func Attach(mnt int, point string) error {
	if !Mounted(point) {
		return unix.MoveMount(mnt, "", unix.AT_FDCWD, point, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	// Beneath (Linux 6.5), so that no overlay is made on the bare directory meanwhile.
	beneath := unix.MoveMount(mnt, "", unix.AT_FDCWD, point, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath)
	if err := unix.Unmount(point, unix.MNT_DETACH); err != nil || beneath == nil {
		return err
	}
	return unix.MoveMount(mnt, "", unix.AT_FDCWD, point, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h.
const moveMountBeneath = 0x200

// Mounted reports whether an EROFS image is mounted on point; the directory below is never on one.
func Mounted(point string) bool {
	var st unix.Statfs_t
	return unix.Statfs(point, &st) == nil && uint32(st.Type) == magic
}
