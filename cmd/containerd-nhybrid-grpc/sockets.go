// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/activation"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// sockets are listening unix sockets that the service manager has passed (sd_listen_fds(3)), by path. They stand before the daemon and after it, so that who
// calls meanwhile waits in their queue rather than being refused.
type sockets map[string]net.Listener

// passedSockets takes the sockets that were passed to this process. Each must be at one of the addresses, since nobody would answer at another, and a unix socket
// to which only root can connect.
func passedSockets(addresses ...string) (sockets, error) {
	return takeSockets(activation.Files(true), addresses)
}

func takeSockets(files []*os.File, addresses []string) (s sockets, err error) {
	s = sockets{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	for _, f := range files {
		l, listenErr := net.FileListener(f)
		err = errors.Join(err, f.Close()) // FileListener has a copy
		if listenErr != nil {
			err = errors.Join(err, fmt.Errorf("take passed socket %q: %w", f.Name(), listenErr))
			continue
		}
		path := l.Addr().String()
		checkErr := checkPassed(l, addresses)
		if checkErr == nil && s[path] != nil {
			checkErr = errdefs.ErrAlreadyExists
		}
		if checkErr != nil {
			err = errors.Join(err, fmt.Errorf("take passed socket %q: %w", path, checkErr), l.Close())
			continue
		}
		s[path] = l
	}
	return s, err
}

// listen takes the socket at path if it was passed, and makes it otherwise.
func (s sockets) listen(path string) (net.Listener, error) {
	if l := s[path]; l != nil {
		delete(s, path)
		return l, nil
	}
	return control.Listen(path)
}

func checkPassed(l net.Listener, addresses []string) error {
	path := l.Addr().String()
	if l.Addr().Network() != "unix" {
		return fmt.Errorf("it is of network %q, the daemon takes unix sockets: %w", l.Addr().Network(), errdefs.ErrInvalidArgument)
	}
	if !slices.Contains(addresses, path) {
		return fmt.Errorf("it is no address of the configuration, which has %q: name the same paths in the socket unit and in the configuration: %w", addresses, errdefs.ErrInvalidArgument)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("by its mode %#o others than root may connect; set SocketMode=0600: %w", mode, errdefs.ErrPermissionDenied)
	}
	return nil
}

func (s sockets) close() (err error) {
	for path, l := range s {
		err = errors.Join(err, l.Close())
		delete(s, path)
	}
	return err
}
