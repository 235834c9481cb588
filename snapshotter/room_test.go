// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// noise is data that does not compress.
func noise(seed int64, n int) string {
	b := make([]byte, n)
	rand.New(rand.NewSource(seed)).Read(b)
	return string(b)
}

// A pull for which there is no room gives back what it has stored, that of the layers that were unpacked ahead as well.
func TestPullWithoutRoomHoldsNothing(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	require.NoError(t, mkdirs(disk))
	require.NoError(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=12m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	d := newDownloads(t, []entry{{name: "large", data: noise(1, 24<<20)}}, []entry{{name: "small", data: noise(2, 1<<20)}})
	policy, err := placement.ParsePolicy("hdd")
	require.NoError(t, err)
	s := start(t, dir, d, func(c *Config) { c.Policy, c.Store.Root = policy, filepath.Join(disk, "hdd") })
	d.arrive(t, 1)
	key, mounts := prepareLayer(t, s, d, 0, "")
	require.Eventually(t, func() bool {
		l, ok := s.store.Find(d.img.Layers[1].Digest)
		return ok && l.State.Valid()
	}, awaitFor, awaitEvery, "the layer above is unpacked ahead")
	d.arrive(t, 0)
	_, err = s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
	require.ErrorIs(t, err, unix.ENOSPC)
	require.Eventually(t, func() bool { return len(s.store.Layers()) == 0 }, awaitFor, awaitEvery)
	require.Eventually(t, func() bool {
		left, err := os.ReadDir(filepath.Join(disk, "hdd", "p"))
		return err == nil && len(left) == 0
	}, awaitFor, awaitEvery)
	require.Zero(t, s.pulls.Count())
	require.NoError(t, s.Remove(inNamespace(t), key)) // as containerd does at some time
}

// So does a pull of which a layer cannot be unpacked for another reason: the next try would fail as well.
func TestFailedPullHoldsNothing(t *testing.T) {
	d := newDownloads(t, []entry{{name: "wrong", data: "w"}}, []entry{{name: "right", data: "r"}})
	d.img.Layers[0].DiffID = digest.FromString("of another layer")
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0)
	d.arrive(t, 1)
	key, mounts := prepareLayer(t, s, d, 0, "")
	require.Eventually(t, func() bool {
		l, ok := s.store.Find(d.img.Layers[1].Digest)
		return ok && l.State.Valid()
	}, awaitFor, awaitEvery, "the layer above is unpacked ahead")
	_, err := s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
	require.ErrorContains(t, err, "diff ID")
	require.Eventually(t, func() bool { return len(s.store.Layers()) == 0 }, awaitFor, awaitEvery)
	require.Zero(t, s.pulls.Count())
	require.NoError(t, s.Remove(inNamespace(t), key)) // as containerd does at some time
}

// An applier that is not ours writes to a directory that may be too small for what it brings. The next try takes another.
func TestExtractionIsNotTriedTwiceOnNVM(t *testing.T) {
	d := newDownloads(t, []entry{{name: "f", data: "x"}}, []entry{{name: "g", data: "y"}})
	s := start(t, t.TempDir(), d, nil)
	onNVM := func(dir string) bool { return strings.HasPrefix(dir, s.store.Tiers.StagingRoot(placement.NVM)) }
	key, mounts := prepareLayer(t, s, d, 0, "")
	require.True(t, onNVM(upperOf(t, mounts)))
	require.NoError(t, s.Remove(inNamespace(t), key))
	key, mounts = prepareLayer(t, s, d, 0, "")
	require.False(t, onNVM(upperOf(t, mounts)))
	d.arrive(t, 0)
	top := commitLayer(t, s, d, 0, key)
	_, mounts = prepareLayer(t, s, d, 1, top)
	require.True(t, onNVM(upperOf(t, mounts)), "others are")
}

// The size that a blob states is looked at for a directory, too.
func TestExtractionIsAdmittedByTheSizeOfItsBlob(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	root, nvm, clean, err := newTiers(dir, "16m")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, clean()) })
	d := newDownloads(t, []entry{{name: "zeros", data: "0"}})
	d.layers[0].Uncompressed = 600 << 20
	s := start(t, dir, d, func(c *Config) { c.Store.Root, c.Store.NVMRoot = root, nvm })
	_, mounts := prepareLayer(t, s, d, 0, "")
	require.True(t, strings.HasPrefix(upperOf(t, mounts), s.store.Tiers.StagingRoot(placement.HDD)))
}

// What a full disk stops is named with its cause and the cure, and done once there is room.
func TestStatusNamesWhatAFullDiskStops(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	require.NoError(t, mkdirs(disk))
	require.NoError(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=12m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	s := start(t, dir, newDownloads(t), func(c *Config) { c.Store.Root = filepath.Join(disk, "hdd") })
	mounts, err := s.Prepare(inNamespace(t), "test/1/build", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "made"), []byte(noise(3, 20_000)), 0o600))
	fill := filepath.Join(disk, "fill")
	full := func() { // the copy of the database comes and goes
		f, err := os.OpenFile(fill, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		require.NoError(t, err)
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		require.ErrorIs(t, err, unix.ENOSPC)
		require.NoError(t, f.Close())
	}
	require.NoError(t, s.store.FlushDatabase(t.Context()))
	full()
	require.NoError(t, s.Commit(inNamespace(t), "test/2/built", "test/1/build"))
	warnings := func() string {
		status, err := s.Control().Status(t.Context())
		require.NoError(t, err)
		return strings.Join(status.GetWarnings(), "\n")
	}
	var said string
	require.Eventually(t, func() bool {
		full()
		said = warnings()
		return strings.Contains(said, "work on layer 1 has failed")
	}, awaitFor, awaitEvery)
	require.Regexp(t, `(?m)^work on layer 1 has failed and is tried again: pack layer 1: .*no space left on device; remove images .*, or enlarge the filesystem$`, said)
	require.Regexp(t, `(?m)^HDD is full: no pull succeeds; remove images .*, or enlarge the filesystem$`, said)
	require.NoError(t, os.Remove(fill))
	_, err = s.Usage(inNamespace(t), "test/2/built")
	require.NoError(t, err)
	require.NotContains(t, warnings(), "has failed")
	require.NotContains(t, warnings(), "HDD is full")
}
