// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// ctr snapshots mounts prints commands for a shell, one for each mount. Options with a backslash have to be quoted.
func TestMountsAsCommands(t *testing.T) {
	d := newDownloads(t, []entry{{name: "file", data: "f"}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0)
	parent := unpackImage(t, s, d)
	for key, prepare := range map[string]func() ([]mount.Mount, error){
		"active": func() ([]mount.Mount, error) { return s.Prepare(inNamespace(t), "test/1/active", parent) },
		"hdd": func() ([]mount.Mount, error) {
			return s.Prepare(inNamespace(t), "test/1/hdd", parent, snapshots.WithLabels(map[string]string{LabelUpperTier: "hdd"}))
		},
		"view": func() ([]mount.Mount, error) { return s.View(inNamespace(t), "test/1/view", parent) },
		"mapped": func() ([]mount.Mount, error) {
			return s.Prepare(inNamespace(t), "test/1/mapped", parent, snapshots.WithLabels(map[string]string{
				snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:100000:65536",
			}))
		},
		"empty": func() ([]mount.Mount, error) { return s.View(inNamespace(t), "test/1/empty", "") },
	} {
		t.Run(key, func(t *testing.T) {
			mounts, err := prepare()
			require.NoError(t, err)
			root := t.TempDir()
			t.Cleanup(func() { require.NoError(t, mount.UnmountAll(root, 0)) })
			var script strings.Builder
			for _, m := range mounts {
				fmt.Fprintf(&script, "mount -t %s %s %s -o '%s'\n", m.Type, m.Source, root, strings.Join(m.Options, ","))
			}
			out, err := exec.CommandContext(t.Context(), "sh", "-exc", script.String()).CombinedOutput()
			require.NoError(t, err, "%s", out)
			info, err := mount.Lookup(root)
			require.NoError(t, err)
			require.Equal(t, key == "view" || key == "empty", strings.Contains(","+info.Options+",", ",ro,"), "%s", info.Options)
			if key != "empty" {
				require.FileExists(t, filepath.Join(root, "file"))
			}
		})
	}
}

// What CRI mounts to copy volumes is read-only where the writable directory stands on HDD: the unmounting of a writable
// overlay syncs that. All others find the snapshot as ever.
func TestVolumesAreCopiedReadOnly(t *testing.T) {
	d := newDownloads(t, []entry{{name: "file", data: "f"}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0)
	parent := unpackImage(t, s, d)
	onHDD := snapshots.WithLabels(map[string]string{LabelUpperTier: "hdd"})
	mounts, err := s.Prepare(inNamespace(t), "test/1/container", parent, onHDD)
	require.NoError(t, err)
	write := func(name string) func(string) error {
		return func(root string) error {
			require.FileExists(t, filepath.Join(root, "file"))
			return os.WriteFile(filepath.Join(root, name), nil, 0o600)
		}
	}
	asCRI := mount.RemoveIDMapOption(mount.RemoveVolatileOption(mounts))
	require.ErrorIs(t, mount.WithTempMount(t.Context(), asCRI, write("volume")), unix.EROFS)
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, write("new")))
	require.NoError(t, mount.WithReadonlyTempMount(t.Context(), mounts, func(root string) error {
		require.FileExists(t, filepath.Join(root, "new"))
		require.NoFileExists(t, filepath.Join(root, "volume"))
		return nil
	}))
	view, err := s.View(inNamespace(t), "test/2/view", parent, onHDD)
	require.NoError(t, err)
	require.ErrorIs(t, mount.WithTempMount(t.Context(), view, write("view")), unix.EROFS)
}
