// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/link"
)

// checkGone fails the test if anything of the rig is left.
func checkGone(t *testing.T, r *Rig) {
	t.Helper()
	require.NoDirExists(t, r.Dir)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.Dir))
	require.NoError(t, err)
	require.Empty(t, mounts)
	pids, err := processesOf(r.Dir)
	require.NoError(t, err)
	require.Empty(t, pids)
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(t, err)
	for _, f := range backing {
		if b, err := os.ReadFile(f); err == nil {
			require.NotContains(t, string(b), r.Dir)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/", "/run/containerd/runc/"} {
		left, err := filepath.Glob(pattern + r.Namespace)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

func TestPullAndRunThroughTheLink(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NoDaemon: true, Rate: 4e6, Latency: time.Millisecond})
	img, err := r.PushTiny(ctx, "tiny:1", image.TinySpec{Runnable: true, Layers: []int64{300_000, 100_000, 0}, Nasty: true})
	require.NoError(t, err)
	layers, err := img.Layers()
	require.NoError(t, err)
	first, err := layers[1].Digest()
	require.NoError(t, err)
	top, err := layers[3].Digest()
	require.NoError(t, err)

	// The first layer above busybox arrives last, though containerd asks for all of them at once.
	release := r.Link.Hold(first.String(), 1000)
	pulled := make(chan error, 1)
	go func() { pulled <- r.Pull(ctx, "tiny:1") }()
	require.NoError(t, r.Link.Await(ctx, link.Done(top.String())))
	require.False(t, link.Done(first.String())(r.Link.Requests()))
	release()
	require.NoError(t, <-pulled)

	out, err := r.RunContainer(ctx, "tiny:1", "c", "cat", "/data/shared", "/nasty/0/becomes-file")
	require.NoError(t, err)
	require.Equal(t, "2\nfile", out)
	out, err = r.RunContainer(ctx, "tiny:1", "c", "ls", "/nasty/1/opaque", "/nasty/1")
	require.NoError(t, err)
	require.Contains(t, out, "new")
	require.NotContains(t, out, "old")
	require.NotContains(t, out, "removed")

	c, err := r.Client()
	require.NoError(t, err)
	images, err := c.ListImages(r.Context(ctx))
	require.NoError(t, err)
	require.Len(t, images, 1)
	require.Equal(t, r.Ref("tiny:1"), images[0].Name())
}

func TestPullResumesAfterTheRegistryDied(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NoDaemon: true})
	img, err := r.PushTiny(ctx, "tiny:1", image.TinySpec{Layers: []int64{1 << 20}})
	require.NoError(t, err)
	layers, err := img.Layers()
	require.NoError(t, err)
	digest, err := layers[0].Digest()
	require.NoError(t, err)
	r.Link.Cut(digest.String(), 500_000, 100)
	require.Error(t, r.Pull(ctx, "tiny:1"))
	r.Link.Cut(digest.String(), 0, 0)
	require.NoError(t, r.Pull(ctx, "tiny:1"))
	var resumed bool
	for _, q := range r.Link.Requests() {
		resumed = resumed || q.Digest == digest.String() && strings.HasPrefix(q.Range, "bytes=")
	}
	require.True(t, resumed, "containerd asked for the rest only: %+v", r.Link.Requests())
}

func TestNerdctl(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NoDaemon: true})
	if err := r.NerdctlUnobtainable(); errors.Is(err, ErrNerdctlUnobtainable) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	_, err = r.Nerdctl(ctx, "pull", "-q", r.Ref("busybox:1"))
	require.NoError(t, err)
	out, err := r.NerdctlRun(ctx, "--rm", r.Ref("busybox:1"), "echo", "hello")
	require.NoError(t, err)
	require.Equal(t, "hello", out)
}

func TestCRI(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NoDaemon: true, CRI: true})
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(ctx, "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	out, err := r.RunPod(ctx, r.Ref("busybox:1"), "sh", "-c", "echo hello from a pod")
	require.NoError(t, err)
	require.Equal(t, "hello from a pod", out)
}

// TestNothingIsLeft has two rigs at once, both killed beneath their containers, one of them
// started again.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	var rigs []*Rig
	for i := range 2 {
		r := New(t, Options{NoDaemon: true})
		rigs = append(rigs, r)
		_, err := r.PushBusybox(ctx, "busybox:1")
		require.NoError(t, err)
		require.NoError(t, r.Pull(ctx, "busybox:1"))
		_, err = r.Ctr(ctx, "run", "-d", r.Ref("busybox:1"), "sleeper", "sleep", "100000")
		require.NoError(t, err, "rig %d: the same container id in two rigs", i)
	}
	pid := rigs[0].Containerd.Pid()
	require.NotZero(t, pid)
	require.NoError(t, rigs[0].Containerd.Kill())
	require.Zero(t, rigs[0].Containerd.Pid())
	pids, err := processesOf(rigs[0].Dir)
	require.NoError(t, err)
	require.Len(t, pids, 2, "shim and container live on")

	require.NoError(t, rigs[1].Containerd.Kill())
	require.NoError(t, rigs[1].Containerd.Start(ctx))
	out, err := rigs[1].Ctr(ctx, "tasks", "exec", "--exec-id", "e", "sleeper", "echo", "still here")
	require.NoError(t, err)
	require.Equal(t, "still here", out)

	for _, r := range rigs {
		require.NoError(t, r.Close())
		checkGone(t, r)
	}
}

func TestDaemonUnderContainerdIsKilledAndNothingIsLeft(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NVMSize: 128 << 20, DaemonArgs: []string{"--set", "placement.policy=nvm"}})
	_, err := r.PushTiny(ctx, "tiny:1", image.TinySpec{Runnable: true, Layers: []int64{300_000, 100_000}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "tiny:1"))
	_, err = r.Ctr(ctx, "run", "-d", r.Ref("tiny:1"), "sleeper", "sleep", "100000")
	require.NoError(t, err)
	out, err := r.Nhybridctl(ctx, "status")
	require.NoError(t, err)
	require.NotEmpty(t, out)

	require.NoError(t, r.Daemon.Kill())
	out, err = r.Ctr(ctx, "tasks", "exec", "--exec-id", "e", "sleeper", "cat", "/data/shared")
	require.NoError(t, err, "containers do not need the daemon")
	require.Equal(t, "1", out)
	require.NoError(t, r.Daemon.Start(ctx))
	require.NoError(t, Await(ctx, func(ctx context.Context) error { // containerd waits a second or more after a call that failed
		_, err := r.Ctr(ctx, "snapshots", "--snapshotter", "nhybrid", "ls")
		return err
	}))
	out, err = r.RunContainer(ctx, "tiny:1", "second", "cat", "/data/shared")
	require.NoError(t, err)
	require.Equal(t, "1", out)

	require.NoError(t, r.Close())
	checkGone(t, r)
}

func TestRemoveFindsEverythingByTheDirectory(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := New(t, Options{NVMSize: 128 << 20, Keep: true})
	t.Cleanup(func() { _ = Remove(r.Dir) })
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "busybox:1"))
	_, err = r.Ctr(ctx, "run", "-d", r.Ref("busybox:1"), "sleeper", "sleep", "100000")
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.True(t, r.Containerd.Running(), "kept")
	require.True(t, r.Daemon.Running())

	require.NoError(t, Remove(r.Dir))
	checkGone(t, r)
	require.False(t, r.Containerd.Running())
	require.Error(t, Remove("/"))
	require.Error(t, Remove("relative"))
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("nh-fail-%d", os.Getpid()))
	_, err := Start(t.Context(), Options{Dir: dir, NoDaemon: true, ContainerdConfig: "[this is no toml"})
	require.ErrorContains(t, err, "start containerd")
	require.ErrorContains(t, err, "toml")
	require.NoDirExists(t, dir)
}
