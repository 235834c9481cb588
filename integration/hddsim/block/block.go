// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package block sets up loop devices and takes whole directories of mounts and loops down again.
package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Loop is an attached loop device. The kernel detaches it by itself when it is closed and no longer mounted, so that
// none stays behind when the process is killed.
type Loop struct {
	file *os.File
}

// ReadAheadKiB is that of a real disk, fast or slow. A loop's own follows from its optimal I/O size, 2560 KiB here: it
// would hide most of a disk's seeks, and make all of a file look touched of which a start reads a part. Over some files the
// kernel sets it back to this, its default, at the next change of the device.
const ReadAheadKiB = 128

// Attach puts a loop device over a file. Its I/O passes the page cache of the file by, so that there is one cache, that
// of the filesystem on top.
func Attach(file string) (*Loop, error) {
	f, err := mount.SetupLoop(file, mount.LoopParams{Autoclear: true, Direct: true})
	if err != nil {
		return nil, fmt.Errorf("attach loop device to %q: %w", file, err)
	}
	l := &Loop{file: f}
	path := filepath.Join("/sys/block", filepath.Base(f.Name()), "queue/read_ahead_kb")
	if err := os.WriteFile(path, []byte(strconv.Itoa(ReadAheadKiB)), 0o644); err != nil {
		return nil, errors.Join(fmt.Errorf("set read-ahead of %q: %w", f.Name(), err), l.Close())
	}
	return l, nil
}

// SetReadAhead sets how far the kernel reads ahead on the filesystem that is mounted on dir.
func SetReadAhead(dir string, kib int) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return fmt.Errorf("set read-ahead of %q: %w", dir, err)
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err := os.WriteFile(path, []byte(strconv.Itoa(kib)), 0); err != nil {
		return fmt.Errorf("set read-ahead of %q: %w", dir, err)
	}
	return nil
}

// Path is the device's path.
func (l *Loop) Path() string { return l.file.Name() }

// Close lets go of the device, which goes with its last user.
func (l *Loop) Close() error { return l.file.Close() }

// MakeExt4 formats the device. Inode tables and journal are written at once: what ext4 leaves to its background thread
// would disturb measurements made right after. options are further ones of mkfs.ext4.
func MakeExt4(ctx context.Context, device string, options ...string) error {
	args := append([]string{"-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"}, options...)
	out, err := exec.CommandContext(ctx, "mkfs.ext4", append(args, device)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4 %q: %w: %s", device, err, out)
	}
	return nil
}

// Mount mounts a filesystem on a directory, which is made where it is missing.
func Mount(source, dir, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s %q on %q: %w", fstype, source, dir, err)
	}
	return nil
}

// Unmount takes the topmost mount off a directory: at once, or, where it is busy, as soon as its last user goes.
// A directory that is no mount point or missing is fine.
func Unmount(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %q: %w", dir, err)
	}
	return nil
}

// UnmountBelow unmounts everything on and below a directory, in the order opposite to that of mounting.
func UnmountBelow(dir string) error {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list mounts below %q: %w", dir, err)
	}
	var errs []error
	for i := len(infos) - 1; i >= 0; i-- {
		errs = append(errs, Unmount(infos[i].Mountpoint))
	}
	return errors.Join(errs...)
}

// DetachBelow detaches the loop devices whose files lie below a directory. One that is still in use goes with its
// last user.
func DetachBelow(dir string) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(backing), filepath.Clean(dir)+"/") {
			continue // gone in the meantime, or not ours
		}
		device := "/dev/" + strings.Split(file, "/")[3]
		if err := detach(device); err != nil {
			errs = append(errs, fmt.Errorf("detach %q: %w", device, err))
		}
	}
	return errors.Join(errs...)
}

func detach(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD)
	if errors.Is(err, unix.ENXIO) {
		return nil // detached by somebody else
	}
	return err
}
