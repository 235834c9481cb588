// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// From linux/quota.h and linux/fs.h; golang.org/x/sys/unix has none of these.
const (
	projectQuota   = 2
	qGetQuota      = 0x800007<<8 | projectQuota
	qSetQuota      = 0x800008<<8 | projectQuota
	validLimits    = 1 // QIF_BLIMITS
	fsXattrGet     = 0x801c581f
	fsXattrSet     = 0x401c5820
	projectInherit = 0x200
	quotaBlock     = 1024 // unit of the limits
)

// diskQuota is struct if_dqblk.
type diskQuota struct {
	blockHard, blockSoft, space  uint64
	inodeHard, inodeSoft, inodes uint64
	blockTime, inodeTime         uint64
	valid                        uint32
	_                            uint32
}

// fsXattr is struct fsxattr.
type fsXattr struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

// SetProjectQuota puts the directory dir into a project and limits what the project may occupy, in bytes (rounded up to
// 1 KiB; 0: no limit). Files made in dir from then on belong to the project; so does nothing that was there before.
// ext4 does not hold to it who has CAP_SYS_RESOURCE, which containers have not by default; xfs holds everyone.
// Where the filesystem keeps no project quotas the error is an errdefs.ErrNotImplemented.
func SetProjectQuota(dir string, project uint32, bytes int64) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("set quota: %w", err)
	}
	defer f.Close()
	// First the question that has no effect: on a filesystem without quotas nothing is changed.
	if _, err := projectUsage(f, project); err != nil {
		return quotaError("set quota of", dir, err)
	}
	limit := uint64(max(bytes, 0)+quotaBlock-1) / quotaBlock
	q := diskQuota{blockHard: limit, blockSoft: limit, valid: validLimits}
	if err := quotactl(f, qSetQuota, project, &q); err != nil {
		return quotaError("set quota of", dir, err)
	}
	if err := setProject(f, project); err != nil {
		return quotaError("set project of", dir, err)
	}
	return nil
}

// ForgetProjectQuota takes the limit of a project away on the filesystem of dir, which itself is not changed. Where the
// filesystem keeps no project quotas the error is an errdefs.ErrNotImplemented.
func ForgetProjectQuota(dir string, project uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("forget quota: %w", err)
	}
	defer f.Close()
	q, err := projectUsage(f, project)
	if err != nil {
		return quotaError("forget quota of", dir, err)
	}
	if q.blockHard == 0 && q.blockSoft == 0 {
		return nil
	}
	return quotactl(f, qSetQuota, project, &diskQuota{valid: validLimits})
}

// ProjectUsage gives what a project occupies on the filesystem of dir, in bytes.
func ProjectUsage(dir string, project uint32) (int64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, fmt.Errorf("ask for quota: %w", err)
	}
	defer f.Close()
	q, err := projectUsage(f, project)
	if err != nil {
		return 0, quotaError("ask for quota of", dir, err)
	}
	return int64(q.space), nil
}

// TryProjectQuota finds out if the filesystem of dir enforces project quotas, by running into one in a scratch directory.
// nil: it does; errdefs.ErrNotImplemented: it does not.
func TryProjectQuota(dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, ".quota-")
	if err != nil {
		return fmt.Errorf("try quota: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()

	project, err := freeProject(tmp)
	if err != nil {
		return err
	}
	const limit = 64 << 10
	if err := SetProjectQuota(tmp, project, limit); err != nil {
		return err
	}
	defer func() { // runs before the directory goes: the project's record is empty afterwards either way
		err = errors.Join(err, SetProjectQuota(tmp, project, 0))
	}()
	err = unprivileged(func() error {
		return os.WriteFile(filepath.Join(tmp, "full"), make([]byte, 4*limit), 0o600)
	})
	switch {
	case errors.Is(err, unix.EDQUOT), errors.Is(err, unix.ENOSPC): // xfs says ENOSPC for projects
		return nil
	case err != nil:
		return fmt.Errorf("try quota: %w", err)
	}
	return fmt.Errorf("filesystem of %q counts project quotas but does not enforce them; mount it with prjquota: %w", dir, errdefs.ErrNotImplemented)
}

// unprivileged runs f without CAP_SYS_RESOURCE, which lets its owner pass over limits (ignore_hardlimit in fs/quota/dquot.c).
func unprivileged(f func() error) error {
	done := make(chan error)
	go func() {
		// Capabilities belong to a thread. This one is never unlocked, so it ends with the goroutine and nobody else runs on it.
		runtime.LockOSThread()
		done <- func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			if err := unix.Capget(&header, &data[0]); err != nil {
				return fmt.Errorf("ask for capabilities: %w", err)
			}
			data[unix.CAP_SYS_RESOURCE/32].Effective &^= 1 << (unix.CAP_SYS_RESOURCE % 32)
			if err := unix.Capset(&header, &data[0]); err != nil {
				return fmt.Errorf("put down a capability: %w", err)
			}
			return f()
		}()
	}()
	return <-done
}

// freeProject finds a project that nobody uses, far from the numbers that people choose.
func freeProject(dir string) (uint32, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, fmt.Errorf("try quota: %w", err)
	}
	defer f.Close()
	for project := uint32(0x6e680000 + os.Getpid()%0xffff); project < 0x6e69ffff; project++ {
		q, err := projectUsage(f, project)
		if err != nil {
			return 0, quotaError("try quota of", dir, err)
		}
		if q.space == 0 && q.inodes == 0 && q.blockHard == 0 {
			return project, nil
		}
	}
	return 0, fmt.Errorf("try quota of %q: no project number is free: %w", dir, errdefs.ErrUnavailable)
}

func projectUsage(f *os.File, project uint32) (q diskQuota, err error) {
	err = quotactl(f, qGetQuota, project, &q)
	if errors.Is(err, unix.ENOENT) { // xfs has no record of a project that was never used
		return q, nil
	}
	return q, err
}

func quotactl(f *os.File, command uint32, id uint32, q *diskQuota) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(command), uintptr(id), uintptr(unsafe.Pointer(q)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func setProject(f *os.File, project uint32) error {
	var x fsXattr
	if err := xattrIoctl(f, fsXattrGet, &x); err != nil {
		return err
	}
	x.project = project
	x.flags |= projectInherit
	return xattrIoctl(f, fsXattrSet, &x)
}

func xattrIoctl(f *os.File, request uintptr, x *fsXattr) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(x)))
	if errno != 0 {
		return errno
	}
	return nil
}

// quotaError classes what kernels answer that have no project quotas for this filesystem.
func quotaError(what, dir string, err error) error {
	for _, none := range []error{unix.ESRCH, unix.ENOTSUP, unix.ENOTTY, unix.ENOSYS, unix.EINVAL, unix.ENODEV} {
		if errors.Is(err, none) {
			return fmt.Errorf("%s %q: the filesystem has no project quotas; they need ext4 or xfs mounted with prjquota: %w: %w", what, dir, err, errdefs.ErrNotImplemented)
		}
	}
	return fmt.Errorf("%s %q: %w", what, dir, err)
}
