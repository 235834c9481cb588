// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package api is the protocol by which the OCI hook and the operator's tool ask the daemon for regions. One connection to the unix socket carries one
// request and one reply: a length of four bytes, little endian, JSON, and with its first byte any open files (SCM_RIGHTS). The package uses little
// beside the standard library, so that the hook, which starts with each container, stays small.
package api

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// Version is refused by a daemon that speaks another.
	Version = 1
	// MaxMessage bounds a message; MaxFiles the files with it.
	MaxMessage = 4 << 20
	MaxFiles   = 2

	// Socket is where the daemon listens unless it is told otherwise.
	Socket = "/run/nhybrid/scm.sock"
	// Image is where an image carries a region, below its root.
	Image = ".scm/region.scmimg"
	// Device is where a container finds its region.
	Device = "/dev/scm/region"
	// Kind of the CDI devices.
	Kind = "nhybrid.io/scm"
	// Plugin is the name of the daemon among the plugins of containerd's NRI.
	Plugin = "nhybrid-scm"
	// NotServed begins the warning of a daemon that serves no regions. The reason follows.
	NotServed = "regions are not served: "
)

// Request is a call. Args depends on Op.
type Request struct {
	Version int             `json:"version"`
	Op      string          `json:"op"`
	Args    json.RawMessage `json:"args,omitempty"`
}

// Reply answers it. Class is the word by which the errdefs package knows the error.
type Reply struct {
	Error  string          `json:"error,omitempty"`
	Class  string          `json:"class,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// Attach asks for the region of a container that is being created. The file, if any, is the region that its image carries. The reply has one file: the
// detached mount. One of Size, Volume and FromImage is set. Tenant is the namespace whose quota counts and in which the volume is, if not that of the container.
type Attach struct {
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	Pid       int    `json:"pid"`
	Size      int64  `json:"size,omitempty"`
	Volume    string `json:"volume,omitempty"`
	FromImage bool   `json:"from_image,omitempty"`
	Tenant    string `json:"tenant,omitempty"`
}

// OpAttach is the Op of Attach.
const OpAttach = "attach"

// Error is a failure that the daemon told.
type Error struct{ Message, Class string }

func (e *Error) Error() string { return e.Message }

// Call sends a request to the daemon at socket, and decodes its result into result unless that is nil. Files that came with the reply are the caller's.
func Call(socket, op string, args, result any, files ...*os.File) ([]*os.File, error) {
	// By system calls: package net would double the size of the hook and the time it takes to start.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	conn := os.NewFile(uintptr(fd), socket)
	defer conn.Close()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("connect to the daemon at %q: %w: it does not run, or gives no regions; see its log and scm.enabled in its configuration", socket, err)
		}
		return nil, fmt.Errorf("connect to the daemon at %q: %w", socket, err)
	}
	raw, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	if err := Write(fd, Request{Version: Version, Op: op, Args: raw}, files...); err != nil {
		return nil, fmt.Errorf("ask the daemon at %q: %w", socket, err)
	}
	var reply Reply
	got, err := Read(fd, &reply)
	if err == nil && reply.Error != "" {
		err = &Error{reply.Error, reply.Class}
	} else if err != nil {
		err = fmt.Errorf("answer of the daemon at %q: %w", socket, err)
	} else if result != nil {
		err = json.Unmarshal(reply.Result, result)
	}
	if err != nil {
		CloseAll(got)
		return nil, err
	}
	return got, nil
}

// CloseAll closes files that nobody wants.
func CloseAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Write sends one message on a socket.
func Write(fd int, v any, files ...*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if len(b) > MaxMessage || len(files) > MaxFiles {
		return fmt.Errorf("message of %d bytes and %d files: %w", len(b), len(files), unix.EMSGSIZE)
	}
	b = append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		n, err := unix.SendmsgN(fd, b, oob, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b, oob = b[n:], nil
	}
	return nil
}

// Read receives one message on a socket, and the files that came with it, which are the caller's.
func Read(fd int, v any) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseAll(files)
			files = nil
		}
	}()
	var head [4]byte
	if files, err = receive(fd, head[:], true); err != nil {
		return files, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > MaxMessage {
		return files, fmt.Errorf("message of %d bytes: %w", n, unix.EMSGSIZE)
	}
	b := make([]byte, n)
	if _, err := receive(fd, b, false); err != nil {
		return files, err
	}
	return files, json.Unmarshal(b, v)
}

func receive(fd int, b []byte, withFiles bool) (files []*os.File, err error) {
	var space []byte
	if withFiles {
		space = make([]byte, unix.CmsgSpace(4*MaxFiles))
	}
	for len(b) > 0 {
		n, oobn, flags, _, err := unix.Recvmsg(fd, b, space, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return files, err
		}
		got, err := filesOf(space[:oobn])
		files = append(files, got...)
		switch {
		case err != nil:
			return files, err
		case flags&unix.MSG_CTRUNC != 0 && withFiles || len(files) > MaxFiles:
			return files, fmt.Errorf("more than %d files: %w", MaxFiles, unix.EMSGSIZE)
		case n == 0:
			return files, io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return files, nil
}

func filesOf(oob []byte) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}
