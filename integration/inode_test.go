//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// rootfs is where the root filesystem of a running container is mounted.
func rootfs(t *testing.T, r *rig.Rig, id string) string {
	t.Helper()
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, r.Dir+"/run/") || !strings.HasSuffix(m.Mountpoint, "/"+id+"/rootfs"), false
	})
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	return mounts[0].Mountpoint
}

type inode struct{ dev, ino uint64 }

// inodes are the numbers of all that stands below a directory.
func inodes(t *testing.T, root string) map[string]inode {
	t.Helper()
	all := map[string]inode{}
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		all[strings.TrimPrefix(path, root)] = inode{st.Dev, st.Ino}
		return nil
	}))
	return all
}

// halves is an archive of directories that a tar finishes at its end, in two parts.
func halves(t *testing.T, n int) (first, second []byte) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range n {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("x/d%d/", i), Typeflag: tar.TypeDir, Mode: 0o755}))
		require.NoError(t, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("x/d%d/l", i), Typeflag: tar.TypeSymlink, Linkname: "../x", Mode: 0o777}))
	}
	// Longer than what tar reads at a time, so that all before it is extracted.
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "x/pad", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1 << 20}))
	_, err := w.Write(make([]byte, 1<<20))
	require.NoError(t, err)
	half := b.Len() - 1<<19
	require.NoError(t, w.Close())
	return b.Bytes()[:half], b.Bytes()[half:]
}

// Programs that walk directories take one with another number for another directory. So what a container sees keeps its
// numbers while files leave NVM, and stands on one device; with xino off nothing of that is touched, but the space is held.
func TestInodeNumbersStay(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{true, false} {
		t.Run("xino="+strconv.FormatBool(on), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=nvm", "--set", "hot.predict=off",
				"--set", "snapshot.xino="+strconv.FormatBool(on))})
			entries := []image.Entry{folder("cold")}
			for i := range 50 {
				entries = append(entries, folder(fmt.Sprintf("cold/d%d", i)), plain(fmt.Sprintf("cold/d%d/f", i), bytes.Repeat([]byte{byte(i)}, 20000)))
			}
			_, err := r.PushBusybox(ctx, "walk:1", ofFiles(t, entries...))
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "walk:1"))
			steer(t, r, "migrate", "pause")
			sleeper(t, r, "walk:1", "walk")
			awaitProfile(t, r, r.Ref("walk:1"), starts(1))
			root := rootfs(t, r, "walk")
			execute(t, r, "walk", "sh", "-c", "cat /cold/*/f >/dev/null; mkdir /new")

			first, second := halves(t, 100)
			command := exec.CommandContext(ctx, "tar", "-xf", "-", "-C", filepath.Join(root, "new"))
			var stderr bytes.Buffer
			command.Stderr = &stderr
			in, err := command.StdinPipe()
			require.NoError(t, err)
			require.NoError(t, command.Start())
			_, err = in.Write(first)
			require.NoError(t, err)
			await(t, func(context.Context) error {
				_, err := os.Stat(filepath.Join(root, "new/x/pad"))
				return err
			})
			before := inodes(t, root)

			steer(t, r, "migrate", "resume")
			now(t, r)
			require.NotContains(t, strings.Join(fast(t, r, r.Ref("walk:1")), "\n"), "cold/", "files left NVM")

			_, err = io.Copy(in, bytes.NewReader(second))
			require.NoError(t, err)
			require.NoError(t, in.Close())
			require.NoError(t, command.Wait(), "%s", &stderr)
			require.Empty(t, stderr.String())
			after := inodes(t, root)
			require.Len(t, after, len(before))
			changed := map[string][2]inode{}
			for path, is := range before {
				if after[path] != is && filepath.Base(path) != "l" { // tar puts a symlink in the place of a file
					changed[path] = [2]inode{is, after[path]}
				}
			}
			require.Empty(t, changed, "of %d", len(before))
			if !on {
				endSleeper(t, r, "walk")
				return
			}
			for path, is := range after {
				require.Equal(t, after[""].dev, is.dev, path)
			}
			require.Equal(t, execute(t, r, "walk", "du", "-sk", "/cold"), execute(t, r, "walk", "du", "-sxk", "/cold"))
			execute(t, r, "walk", "rm", "-r", "/cold", "/new")
			endSleeper(t, r, "walk")
		})
	}
}

func folder(name string) image.Entry {
	return image.Entry{Header: tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755}}
}

// Inodes of NVM are kept free like bytes: an image of more small files than there are inodes goes to HDD for the rest, and
// containers still write on NVM.
func TestInodesAreCounted(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	// Bytes are not what is short, whatever is known of the layers when they are placed.
	r := newRig(t, rig.Options{NVMSize: 256 << 20, NVMMkfs: []string{"-N", "12288"}, DaemonArgs: []string{"--set", "placement.policy=nvm", "--set", "placement.nvm_reserve=20%"}})
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(r.NVM, &st))
	total := int64(st.Files)
	var entries []image.Entry
	for i := range total + 1000 {
		entries = append(entries, plain(fmt.Sprintf("d/%d/%d", i/500, i), bytes.Repeat([]byte("x"), 300))) // too large for the metadata
	}
	_, err := r.PushBusybox(ctx, "many:1", ofFiles(t, entries...))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "many:1"))
	require.NoError(t, unix.Statfs(r.NVM, &st))
	require.Greater(t, int64(st.Ffree), total/5-500, "the reserve of inodes stays, but for directories")
	require.Less(t, int64(st.Ffree), total/4, "and the rest is used")
	why, err := r.Nhybridctl(ctx, "why", r.Ref("many:1"))
	require.NoError(t, err)
	require.Contains(t, why, "NVM has too few inodes")
	status, err := r.Nhybridctl(ctx, "status")
	require.NoError(t, err)
	require.Contains(t, status, "warning: NVM has too few inodes")
	out, err := r.RunContainer(ctx, "many:1", "c", "sh", "-ec", "for i in 1 2 3; do echo $i >/w$i; done; cat /w*; cat /d/*/* | wc -c")
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("1\n2\n3\n%d", 300*(total+1000)), out)
}
