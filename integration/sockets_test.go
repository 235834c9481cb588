//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
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
	// containerd waits a second, for which a machine may be too busy. So each trial is repeated until it is in time; without standing sockets none ever is.

	// A container is started, a region is asked for.
	n := 0
	await(t, func(ctx context.Context) error {
		n++
		if err := r.Daemon.Kill(); err != nil {
			return err
		}
		ran := start(func() error {
			_, err := r.Ctr(ctx, "-n", "k8s.io", "run", "--rm", r.Ref("busybox:1"), fmt.Sprintf("waits-%d", n), "true")
			return err
		})
		asked := start(func() error {
			_, err := r.Nhybridctl(ctx, "scm", "create", fmt.Sprintf("orders-%d", n), "--size", "1m", "--scm-address", r.RegionSocket())
			return err
		})
		return errors.Join(r.AwaitCall(ctx), r.Daemon.Start(ctx), asked(), ran())
	})

	// containerd is started.
	const forgot = "Failed to check whether image is unpacked"
	await(t, func(ctx context.Context) error {
		before := strings.Count(r.Containerd.Log(), forgot)
		if err := errors.Join(r.Containerd.Stop(), r.Daemon.Kill()); err != nil {
			return err
		}
		started := start(func() error { return r.Containerd.Start(ctx) })
		err := errors.Join(r.AwaitCall(ctx), r.Daemon.Start(ctx), started())
		var out string
		if err == nil {
			err = rig.Await(ctx, func(ctx context.Context) (err error) { // CRI has begun
				out, err = r.Crictl(ctx, "images", "-o", "json")
				return err
			})
		}
		switch {
		case err != nil:
			return err
		case strings.Count(r.Containerd.Log(), forgot) > before:
			return errors.New("containerd did not wait")
		case !strings.Contains(out, r.Ref("busybox:1")):
			return fmt.Errorf("CRI lists %s", out)
		}
		return nil
	})

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
