//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// topOf is the chain id of an image: the name of the snapshot that containers stand on.
func topOf(t *testing.T, r *rig.Rig, name string) string {
	t.Helper()
	c, err := r.Client()
	require.NoError(t, err)
	ctx := r.Context(soon(t))
	img, err := c.GetImage(ctx, r.Ref(name))
	require.NoError(t, err)
	ids, err := img.RootFS(ctx)
	require.NoError(t, err)
	return identity.ChainID(ids).String()
}

// kept are labels that keep a snapshot from containerd's garbage collection.
var kept = map[string]string{"containerd.io/gc.root": "test"}

// prepare makes an active snapshot that is removed with the test.
func prepare(t *testing.T, r *rig.Rig, key, parent string, labels map[string]string) []mount.Mount {
	t.Helper()
	s := service(t, r, r.Snapshotter)
	ctx := r.Context(soon(t))
	mounts, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(kept), snapshots.WithLabels(labels))
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Remove(r.Context(context.Background()), key) }) // may be gone
	return mounts
}

// service is a snapshotter as a client of containerd sees it.
func service(t *testing.T, r *rig.Rig, snapshotter string) snapshots.Snapshotter {
	t.Helper()
	c, err := r.Client()
	require.NoError(t, err)
	return c.SnapshotService(snapshotter)
}

// mounted mounts a view of an image and returns the directory.
func mounted(t *testing.T, r *rig.Rig, snapshotter, name string) string {
	t.Helper()
	s := service(t, r, snapshotter)
	ctx := r.Context(soon(t))
	dir := t.TempDir()
	key := "view of " + name + " at " + dir
	mounts, err := s.View(ctx, key, topOf(t, r, name), snapshots.WithLabels(kept))
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = mount.UnmountAll(dir, unix.MNT_DETACH)
		_ = s.Remove(r.Context(context.Background()), key)
	})
	require.NoError(t, mount.All(mounts, dir), "%+v", mounts)
	return dir
}

// fullNVM is satisfied when NVM has less room than the default reserve of 5 %.
func fullNVM(r *rig.Rig) func(context.Context) error {
	return func(context.Context) error {
		var st unix.Statfs_t
		if err := unix.Statfs(r.NVM, &st); err != nil {
			return err
		}
		if st.Bavail*20 > st.Blocks {
			return fmt.Errorf("%d of %d blocks are free", st.Bavail, st.Blocks)
		}
		return nil
	}
}

// viewsOf are the mount points of all views of a rig.
func viewsOf(t *testing.T, r *rig.Rig) (dirs []string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.Dir))
	require.NoError(t, err)
	for _, m := range mounts {
		if m.FSType == "erofs" {
			dirs = append(dirs, m.Mountpoint)
		}
	}
	return dirs
}

// mountedAt mounts and returns the directory.
func mountedAt(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { _ = mount.UnmountAll(dir, unix.MNT_DETACH) })
	require.NoError(t, mount.All(mounts, dir), "%+v", mounts)
	return dir
}

func inNamespace(ctx context.Context, ns string) context.Context {
	return namespaces.WithNamespace(ctx, ns)
}

func withLabels(labels map[string]string) snapshots.Opt { return snapshots.WithLabels(labels) }

// run runs a command in a container of its own.
func run(t *testing.T, r *rig.Rig, name string, command ...string) string {
	t.Helper()
	out, err := r.RunContainer(soon(t), name, fmt.Sprintf("run%d", containers.Add(1)), command...)
	require.NoError(t, err)
	return out
}

var containers atomic.Int64

// reachable is satisfied when containerd reaches the daemon. Its client waits before it dials again. Only what changes
// something is sure to be asked of the daemon: containerd answers the rest itself where it knows of no snapshot.
func reachable(r *rig.Rig) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := r.Client()
		if err != nil {
			return err
		}
		s, ctx := c.SnapshotService(r.Snapshotter), r.Context(ctx)
		key := fmt.Sprintf("reachable-%d", containers.Add(1))
		if _, err := s.Prepare(ctx, key, ""); err != nil {
			return err
		}
		if err := s.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) { // collected before
			return err
		}
		return nil
	}
}
