//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// A containerd that does not see our mounts would run containers with an empty root. It is told so instead.
func TestContainerdInAnotherMountNamespace(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{})
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "busybox:1"))
	require.NoError(t, r.Containerd.Stop())
	bin := os.Getenv("NHYBRID_BIN")
	if bin == "" {
		bin, err = filepath.Abs("../bin")
		require.NoError(t, err)
	}
	cmd := exec.Command("unshare", "-m", "--propagation", "private", filepath.Join(bin, "containerd"), "--config", filepath.Join(r.Dir, "containerd.toml"))
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	require.NoError(t, cmd.Start())
	end := func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
	t.Cleanup(end)
	await(t, func(ctx context.Context) error {
		_, err := r.Ctr(ctx, "version")
		return err
	})
	_, err = r.RunContainer(ctx, "busybox:1", "blind", "echo", "hello")
	require.ErrorContains(t, err, "another mount namespace")
	end()
	require.NoError(t, r.Containerd.Start(ctx))
	require.Equal(t, "hello", run(t, r, "busybox:1", "echo", "hello"))
}
