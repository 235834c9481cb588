//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// With sockets that stand before the daemon, as of docs/nhybrid.socket, whoever calls while the daemon is away waits for it. Without them the same calls fail at once, and a
// containerd that is started meanwhile knows no image for CRI until it is started again.
func TestCallsWaitAtStandingSockets(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{CRI: true, Sockets: true})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	images := func() string {
		out, err := r.Crictl(soon(t), "images", "-o", "json")
		require.NoError(t, err)
		return out
	}
	require.Contains(t, images(), r.Ref("busybox:1"))

	// A container is started, a region is asked for.
	require.NoError(t, r.Daemon.Kill())
	ran := start(func() error {
		_, err := r.Ctr(soon(t), "-n", "k8s.io", "run", "--rm", r.Ref("busybox:1"), "waits", "true")
		return err
	})
	asked := start(func() error {
		_, err := r.Nhybridctl(soon(t), "scm", "create", "orders", "--size", "1m", "--scm-address", r.RegionSocket())
		return err
	})
	require.NoError(t, r.AwaitCall(soon(t)))
	require.NoError(t, r.Daemon.Start(soon(t)))
	require.NoError(t, ran())
	require.NoError(t, asked())

	// containerd is started.
	require.NoError(t, r.Containerd.Stop())
	require.NoError(t, r.Daemon.Kill())
	started := start(func() error { return r.Containerd.Start(soon(t)) })
	require.NoError(t, r.AwaitCall(soon(t)))
	require.NoError(t, r.Daemon.Start(soon(t)))
	require.NoError(t, started())
	require.Contains(t, images(), r.Ref("busybox:1"))
	require.NotContains(t, r.Containerd.Log(), "Failed to check whether image is unpacked")

	// The sockets are not the daemon's to remove.
	require.NoError(t, r.Daemon.Stop())
	require.FileExists(t, r.DaemonSocket())
	require.FileExists(t, r.RegionSocket())
	require.NoError(t, r.Daemon.Start(soon(t)))
	require.Empty(t, warnings(t, r))
}

// A containerd that is started while the daemon is away finds no image unpacked, and CRI forgets all. The daemon makes it look again.
func TestImagesThatCRIForgot(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{CRI: true})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	require.NoError(t, r.Containerd.Stop())
	require.NoError(t, r.Daemon.Kill())
	require.NoError(t, r.Containerd.Start(soon(t)))
	await(t, func(ctx context.Context) error { // CRI has begun
		out, err := r.Crictl(ctx, "images", "-o", "json")
		if err == nil && strings.Contains(out, r.Ref("busybox:1")) {
			t.Error("CRI has not forgotten the image: the test shows nothing")
		}
		return err
	})
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, func(ctx context.Context) error {
		out, err := r.Crictl(ctx, "images", "-o", "json")
		if err == nil && !strings.Contains(out, r.Ref("busybox:1")) {
			err = fmt.Errorf("CRI lists %s", out)
		}
		return err
	})
	await(t, reachable(r))
	out, err := r.RunPod(soon(t), r.Ref("busybox:1"), "echo", "works")
	require.NoError(t, err)
	require.Equal(t, "works", out)
	images, err := r.Crictl(soon(t), "images", "-q")
	require.NoError(t, err)
	require.Len(t, strings.Fields(images), 2, "the pause image is the other")
	_, err = r.Crictl(soon(t), "rmi", r.Ref("busybox:1"))
	require.NoError(t, err, "it can be collected, too")
}
