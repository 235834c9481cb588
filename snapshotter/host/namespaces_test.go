// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestPropagates(t *testing.T) {
	table := func(lines ...string) string { return strings.Join(lines, "\n") + "\n" }
	const root, private = "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw", "1 0 8:1 / / rw - ext4 /dev/sda1 rw"
	const run, slave, other = "2 1 0:5 / /run rw shared:7 - tmpfs tmpfs rw", "2 1 0:5 / /run rw master:7 - tmpfs tmpfs rw", "2 1 0:5 / /run rw shared:9 - tmpfs tmpfs rw"
	for name, x := range map[string]struct {
		from, to string
		want     bool
	}{
		"peers":              {table(root, run), table(root, run), true},
		"slave":              {table(root, run), table(root, slave), true},
		"shared slave":       {table(root, run), table(root, strings.Replace(slave, "master:7", "shared:8 master:7", 1)), true},
		"private":            {table(root, run), table(root, strings.Replace(run, "shared:7 ", "", 1)), false},
		"other group":        {table(root, run), table(root, other), false},
		"daemon is a slave":  {table(root, slave), table(root, run), false},
		"all private":        {table(private), table(private), false},
		"the last one on it": {table(root, run, other), table(root, run), false},
		"a longer name":      {table(root, "3 1 0:6 / /run/nhybrid2 rw - tmpfs tmpfs rw"), table(root), true},
		"a shorter name":     {table(root, "3 1 0:6 / /run/nhy rw - tmpfs tmpfs rw"), table(root), true},
		"no tables":          {"", "", false},
	} {
		require.Equal(t, x.want, Propagates(x.from, x.to, "/run/nhybrid/state"), name)
	}
	shared, _ := peers(table(root, `2 1 0:5 / /run\040x rw shared:7 - tmpfs tmpfs rw`), "/run x/state")
	require.Equal(t, "7", shared)
}

// TestListens is no test: it listens for TestReach in a process of its own.
func TestListens(t *testing.T) {
	socket := os.Getenv("NHYBRID_TEST_LISTEN")
	if socket == "" {
		t.Skip("it is a part of TestReach")
	}
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	require.NoError(t, l.Close())
}

func TestReach(t *testing.T) {
	requireRoot(t)
	dir, err := os.MkdirTemp("", "reach") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	socket := filepath.Join(dir, "s")
	require.NoError(t, NewReach(socket, dir).Check(), "nobody listens")
	listen := func(command ...string) (stop func()) {
		command = append(command, os.Args[0], "-test.run=^TestListens$")
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Env = append(os.Environ(), "NHYBRID_TEST_LISTEN="+socket)
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "ready\n", line)
		return func() {
			require.NoError(t, in.Close())
			_, _ = io.Copy(io.Discard, out)
			require.NoError(t, cmd.Wait())
		}
	}
	r := NewReach(socket, dir)
	stop := listen("env")
	require.NoError(t, r.Check())
	require.NoError(t, r.Check())
	stop()
	stop = listen("unshare", "-m", "--propagation", "private")
	err = r.Check()
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "another mount namespace")
	stop()
	stop = listen("env")
	require.NoError(t, r.Check(), "it was put right")
	stop()
}
