// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// newTiers makes a directory pair below dir: NVM is a tmpfs of the given size.
func newTiers(dir string, size string) (root, nvm string, clean func() error, err error) {
	mnt := filepath.Join(dir, "nvm")
	if err := mkdirs(mnt); err != nil {
		return "", "", nil, err
	}
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "mode=755,size="+size); err != nil {
		return "", "", nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	return filepath.Join(dir, "hdd"), filepath.Join(mnt, "n"), func() error { return unix.Unmount(mnt, unix.MNT_DETACH) }, nil
}

func unmountAll(s *Snapshotter) error {
	var errs []error
	for _, d := range []string{"v", "i", "p"} {
		names, err := filepath.Glob(s.store.StatePath(d, "*"))
		errs = append(errs, err)
		for _, n := range names {
			if pack.Mounted(n) {
				errs = append(errs, unix.Unmount(n, unix.MNT_DETACH))
			}
		}
	}
	return errors.Join(errs...)
}

// suiteSnapshotter reaches a snapshotter through a socket, as containerd does.
func suiteSnapshotter(policy, nvmSize string) func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	return func(ctx context.Context, dir string) (snapshots.Snapshotter, func() error, error) {
		p, err := placement.ParsePolicy(policy)
		if err != nil {
			return nil, nil, err
		}
		root, nvm, clean, err := newTiers(dir, nvmSize)
		if err != nil {
			return nil, nil, err
		}
		s, err := New(ctx, Config{Store: store.Config{Root: root, NVMRoot: nvm, WriteBack: true}, Policy: p, UpperTier: placement.NVM})
		if err != nil {
			return nil, nil, errors.Join(err, clean())
		}
		stop := func() error { return errors.Join(s.Close(), unmountAll(s), clean()) }
		l, err := net.Listen("unix", filepath.Join(dir, "s"))
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		srv := grpc.NewServer()
		snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(s))
		go func() { _ = srv.Serve(l) }()
		conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "nhybrid"), func() error {
			err := conn.Close()
			srv.Stop()
			return errors.Join(err, stop())
		}, nil
	}
}

// TestSuite runs containerd's own tests of the contract of a snapshotter.
func TestSuite(t *testing.T) {
	requireRoot(t)
	for _, c := range []struct {
		name, policy, size string
	}{
		{"lass", "lass", "256m"},
		{"drain", "drain", "256m"},
		{"nvm", "nvm", "256m"},
		{"hdd", "hdd", "256m"},
		{"boundary", "boundary=1", "256m"},
		{"smallNVM", "nvm", "4m"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The name is what the suite goes by to expect the semantics of overlayfs for renames.
			testsuite.SnapshotterSuite(t, "overlayfs", suiteSnapshotter(c.policy, c.size))
		})
	}
}
