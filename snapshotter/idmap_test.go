// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// In a container with a user namespace the image has the owners of the namespace. containerd itself looks at the snapshot with
// the owners of the image: CRI to copy what the image has in a volume, and whoever wants to know what a container has changed.
func TestOwnersWithAUserNamespace(t *testing.T) {
	for _, tier := range []string{"nvm", "hdd"} {
		t.Run(tier, func(t *testing.T) { ownersWithAUserNamespace(t, tier) })
	}
}

func ownersWithAUserNamespace(t *testing.T, tier string) {
	t.Helper()
	d := newDownloads(t, []entry{{name: "root", data: "r"}, {name: "user", data: "u", uid: 1000}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0)
	parent := unpackImage(t, s, d)
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
		LabelUpperTier: tier,
	})
	owner := func(path string) [2]uint32 {
		t.Helper()
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		return [2]uint32{st.Uid, st.Gid}
	}
	shows := func(root string, shiftUID, shiftGID uint32) {
		t.Helper()
		require.Equal(t, [2]uint32{shiftUID, shiftGID}, owner(filepath.Join(root, "root")))
		require.Equal(t, [2]uint32{1000 + shiftUID, 1000 + shiftGID}, owner(filepath.Join(root, "user")))
		for name, want := range map[string]string{"root": "r", "user": "u"} {
			got, err := os.ReadFile(filepath.Join(root, name))
			require.NoError(t, err)
			require.Equal(t, want, string(got))
		}
	}
	inspect := func(mounts []mount.Mount) {
		t.Helper()
		require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
			shows(root, 100000, 200000)
			return nil
		}))
		require.NoError(t, mount.WithTempMount(t.Context(), mount.RemoveIDMapOption(mounts), func(root string) error {
			shows(root, 0, 0)
			return nil
		}), "as CRI copies a volume")
		require.NoError(t, mount.WithReadonlyTempMount(t.Context(), mounts, func(root string) error {
			shows(root, 0, 0)
			return nil
		}), "as a diff reads it")
		require.NoError(t, mount.WithReadonlyTempMount(t.Context(), mount.RemoveIDMapOption(mounts), func(root string) error {
			shows(root, 0, 0)
			return nil
		}))
	}
	_, err := s.Prepare(inNamespace(t), "test/1/container", parent, labels)
	require.NoError(t, err)
	for range 2 {
		mounts, err := s.Mounts(inNamespace(t), "test/1/container")
		require.NoError(t, err)
		inspect(mounts)
	}
	require.NoError(t, mount.WithTempMount(t.Context(), mountsOf(t, s, "test/1/container"), func(root string) error {
		return os.WriteFile(filepath.Join(root, "new"), []byte("n"), 0o644)
	}))
	require.NoError(t, mount.WithReadonlyTempMount(t.Context(), mountsOf(t, s, "test/1/container"), func(root string) error {
		require.FileExists(t, filepath.Join(root, "new"))
		return nil
	}))
	view, err := s.View(inNamespace(t), "test/2/view", parent, labels)
	require.NoError(t, err)
	inspect(view)

	require.NoError(t, s.Remove(inNamespace(t), "test/1/container"))
	require.NoError(t, s.Remove(inNamespace(t), "test/2/view"))
	require.NoError(t, s.Cleanup(inNamespace(t)))
	for _, dir := range []string{"i", "u"} {
		left, err := os.ReadDir(s.store.StatePath(dir))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

func mountsOf(t *testing.T, s *Snapshotter, key string) []mount.Mount {
	t.Helper()
	mounts, err := s.Mounts(inNamespace(t), key)
	require.NoError(t, err)
	return mounts
}
