// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

// A process in a private mount namespace stands for containerd: it does not see what is mounted here from now on.
func TestNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mount namespaces need root")
	}
	dir, err := os.MkdirTemp("", "ns") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	c := config.Default()
	c.Containerd.Address = filepath.Join(dir, "c.sock")
	c.Root, c.NVMRoot, c.State = filepath.Join(dir, "hdd"), filepath.Join(dir, "nvm"), filepath.Join(dir, "state")
	for _, d := range []string{c.Root, c.NVMRoot, c.State} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	has(t, Namespaces(c, os.Getpid()), Warn, "mounts", "were not compared")

	l, err := net.Listen("unix", c.Containerd.Address)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	has(t, Namespaces(c, os.Getpid()), OK, "mounts", "in one mount namespace")

	// The daemon's side: another process, whose namespace is its own.
	other := func(propagation string) int {
		cmd := exec.CommandContext(t.Context(), "unshare", "-m", "--propagation", propagation, "sh", "-c", "echo ready; exec cat")
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "ready\n", line)
		t.Cleanup(func() { _ = in.Close(); _, _ = io.Copy(io.Discard, out); _ = cmd.Wait() })
		return cmd.Process.Pid
	}
	all := Namespaces(c, other("private"))
	has(t, all, Fail, "mounts", "does not reach it: containers start with an empty root filesystem")
	require.NotEmpty(t, all[0].Cure)

	// A tier that is mounted on one side only.
	require.NoError(t, unix.Mount("tmpfs", c.NVMRoot, "tmpfs", 0, "size=64k"))
	pid := other("private")
	require.NoError(t, unix.Unmount(c.NVMRoot, unix.MNT_DETACH))
	has(t, Namespaces(c, pid), Fail, "mounts", "does not see its nvm_root")
}
