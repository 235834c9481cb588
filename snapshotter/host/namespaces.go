// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Reach tells whether the process that listens on a socket sees what this
// process mounts below a directory. It may be used by several goroutines at once.
type Reach struct {
	socket, dir string

	mu   sync.Mutex
	seen string // the mount namespace that was found to see it
}

// NewReach asks about who listens on a socket, and mounts below dir.
func NewReach(socket, dir string) *Reach { return &Reach{socket: socket, dir: dir} }

// Check is nil if they are seen, or if nobody can tell; else an
// errdefs.ErrFailedPrecondition with the cure.
func (r *Reach) Check() error {
	pid, err := Listener(r.socket)
	if err != nil || pid == 0 { // not there, or in a pid namespace that is not seen
		return nil // who cannot be asked is not accused
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil // likewise
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if theirs == r.seen {
		return nil
	}
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil // likewise
	}
	if ours != theirs {
		var tables [2]string
		for i, of := range []string{"self", fmt.Sprint(pid)} {
			b, err := os.ReadFile("/proc/" + of + "/mountinfo")
			if err != nil {
				return nil // likewise
			}
			tables[i] = string(b)
		}
		if !SameDir(os.Getpid(), pid, r.dir) || !Propagates(tables[0], tables[1], r.dir) {
			return fmt.Errorf("containerd (process %d) is in another mount namespace, and what is mounted below %q does not reach it; run both in one mount namespace (nhybridctl doctor tells more): %w",
				pid, r.dir, errdefs.ErrFailedPrecondition)
		}
	}
	r.seen = theirs
	return nil
}

// Listener is the process that listens on a unix socket.
func Listener(address string) (int, error) {
	conn, err := net.DialTimeout("unix", address, time.Second)
	if err != nil {
		return 0, fmt.Errorf("ask who listens on %q: %w", address, err)
	}
	defer conn.Close()
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%q is no unix socket: %w", address, errdefs.ErrInvalidArgument)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask who listens on %q: %w", address, err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, fmt.Errorf("ask who listens on %q: %w", address, err)
	}
	if credErr != nil {
		return 0, fmt.Errorf("ask who listens on %q: %w", address, credErr)
	}
	return int(cred.Pid), nil
}

// SameDir tells whether two processes find the same directory at path.
func SameDir(a, b int, path string) bool {
	one, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", a, path))
	if err != nil {
		return false
	}
	two, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", b, path))
	return err == nil && os.SameFile(one, two)
}

// Propagates tells, of two mount tables (proc(5), mountinfo), whether a mount made below dir in the first appears in the
// second: the mount that dir stands on must be shared, and its counterpart of the same peer group or a slave of that group.
func Propagates(from, to, dir string) bool {
	shared, _ := peers(from, dir)
	if shared == "" {
		return false
	}
	own, master := peers(to, dir)
	return shared == own || shared == master
}

// peers gives the peer groups that the mount of dir shares with, and that it is a slave of; "" for none.
func peers(table, dir string) (shared, master string) {
	above := func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != "/" && m.Mountpoint != dir && !strings.HasPrefix(dir, m.Mountpoint+"/"), false
	}
	mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(table), above)
	if err != nil {
		return "", ""
	}
	longest := -1
	for _, m := range mounts {
		if len(m.Mountpoint) < longest { // of mounts on top of each other the last counts
			continue
		}
		longest, shared, master = len(m.Mountpoint), "", ""
		for _, tag := range strings.Fields(m.Optional) {
			if g, ok := strings.CutPrefix(tag, "shared:"); ok {
				shared = g
			}
			if g, ok := strings.CutPrefix(tag, "master:"); ok {
				master = g
			}
		}
	}
	return shared, master
}
