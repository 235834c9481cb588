// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// Dir is a Root over a directory, such as a mounted image. Whatever links the image holds, nothing outside the directory
// is reached: every name is looked up by openat2(2) with RESOLVE_IN_ROOT (Linux 5.6), for which "/" and ".." end at the
// directory. Only regular files and directories are opened; a device or a FIFO could block, or do things. It may be used
// from several goroutines.
type Dir struct {
	fd int
}

// OpenDir makes a Dir. Close it when done.
func OpenDir(name string) (*Dir, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &Dir{fd}, nil
}

// Close ends the use of the directory.
func (d *Dir) Close() error { return unix.Close(d.fd) }

// at opens a name without any right to its content.
func (d *Dir) at(op, name string, flags uint64) (int, error) {
	if !fs.ValidPath(name) {
		return -1, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(d.fd, name, &how)
		// EAGAIN: something was renamed meanwhile, and the kernel could not tell whether ".." still ends in the root.
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return -1, &fs.PathError{Op: op, Path: name, Err: err}
		}
		return fd, nil
	}
}

// Open opens a regular file or a directory for reading.
func (d *Dir) Open(name string) (fs.File, error) {
	fd, err := d.at("open", name, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("neither a regular file nor a directory")}
	}
	// The very file that was looked at, not once more by name.
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDONLY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.Unwrap(err)}
	}
	return f, nil
}

// Lstat describes a name without following it.
func (d *Dir) Lstat(name string) (fs.FileInfo, error) {
	fd, err := d.at("lstat", name, unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path.Base(name)) // FileInfo takes its name from here
	defer f.Close()
	return f.Stat()
}

// ReadLink gives the target of a link.
func (d *Dir) ReadLink(name string) (string, error) {
	fd, err := d.at("readlink", name, unix.O_NOFOLLOW)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", b)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(b[:n]), nil
}

var _ Root = (*Dir)(nil)
