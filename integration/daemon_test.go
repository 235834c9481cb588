//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// program is the path of one that the rig uses too.
func program(t *testing.T, name string) string {
	t.Helper()
	bin := os.Getenv("NHYBRID_BIN")
	if bin == "" {
		bin = filepath.Join("..", "bin")
	}
	path, err := filepath.Abs(filepath.Join(bin, name))
	require.NoError(t, err)
	return path
}

// refused runs the daemon with arguments that it must not start with, and returns the one line that it says.
func refused(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(t, "containerd-nhybrid-grpc"), args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	require.NoError(t, ctx.Err(), "the daemon goes on with %q:\n%s", args, out.String())
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, "%s", out.String())
	require.Equal(t, 1, exit.ExitCode(), "%s", out.String())
	var said []string
	for line := range strings.Lines(out.String()) {
		if !strings.HasPrefix(line, "time=") { // its log
			said = append(said, line)
		}
	}
	require.Len(t, said, 1, "one line says what is wrong:\n%s", out.String())
	require.Regexp(t, "^containerd-nhybrid-grpc: ", said[0])
	return strings.TrimSpace(said[0])
}

// arguments are those that the rig starts its daemon with.
func arguments(r *rig.Rig, more ...string) []string {
	return append([]string{
		"--config", filepath.Join(r.Dir, "nhybrid.toml"), "--address", r.DaemonSocket(), "--root", r.HDD, "--nvm-root", r.NVM,
	}, more...)
}

// print is a checksum of all that is stored below directories: names, attributes and content.
func print(t *testing.T, dirs ...string) string {
	t.Helper()
	sum := sha256.New()
	for _, dir := range dirs {
		require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			fmt.Fprintf(sum, "%q %o %d %d %d %d\n", path, st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev)
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(sum, "%d %x\n", len(b), sha256.Sum256(b))
			case unix.S_IFLNK:
				to, err := os.Readlink(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(sum, "%q\n", to)
			}
			return nil
		}))
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// reboot takes the mounts away that would not survive one. Daemon and containers must have ended.
func reboot(t *testing.T, r *rig.Rig) {
	t.Helper()
	state := filepath.Join(r.Dir, "state")
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(state))
	require.NoError(t, err)
	for _, m := range slices.Backward(mounts) { // views, parts, what looked at an image
		require.NoError(t, unix.Unmount(m.Mountpoint, 0), m.Mountpoint)
	}
	require.NoError(t, os.RemoveAll(state))
}

// oneView is the path of the only image of a view of a rig.
func oneView(t *testing.T, r *rig.Rig) string {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(r.NVM, "v", "*.erofs"))
	require.NoError(t, err)
	require.Len(t, images, 1)
	return images[0]
}
