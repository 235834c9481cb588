// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"
)

// ctr snapshots mounts prints commands for a shell, one for each mount. Options with a backslash have to be quoted.
func TestMountsAsCommands(t *testing.T) {
	d := newDownloads(t, []entry{{name: "file", data: "f"}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0)
	parent := unpackImage(t, s, d)
	for key, prepare := range map[string]func() ([]mount.Mount, error){
		"active": func() ([]mount.Mount, error) { return s.Prepare(inNamespace(t), "test/1/active", parent) },
		"view":   func() ([]mount.Mount, error) { return s.View(inNamespace(t), "test/1/view", parent) },
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
