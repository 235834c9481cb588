// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// holdSockets makes the sockets on which containerd and containers reach the daemon, as systemd does with docs/nhybrid.socket: they stand while no daemon
// runs, and each daemon is given them.
func (r *Rig) holdSockets() error {
	for _, path := range []string{r.DaemonSocket(), r.RegionSocket()} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return fmt.Errorf("hold socket: %w", err)
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		err = errors.Join(err, l.Close(), os.Chmod(path, 0o600))
		if f != nil {
			r.sockets = append(r.sockets, f)
		}
		if err != nil {
			return fmt.Errorf("hold socket %q: %w", path, err)
		}
	}
	r.Daemon.files = r.sockets
	return nil
}

// AwaitCall waits until somebody has connected to the snapshotter's socket whom no daemon has answered. The rig must hold the sockets.
func (r *Rig) AwaitCall(ctx context.Context) error {
	return poll(ctx, func(context.Context) error {
		p := []unix.PollFd{{Fd: int32(r.sockets[0].Fd()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 {
			return fmt.Errorf("nobody has connected to %q: %w", r.DaemonSocket(), err)
		}
		return nil
	})
}
