// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// start opens a snapshotter below dir; change may adapt its configuration.
func start(t *testing.T, dir string, d *downloads, change func(*Config)) *Snapshotter {
	t.Helper()
	requireRoot(t)
	p, err := placement.ParsePolicy("drain")
	require.NoError(t, err)
	c := Config{
		Store: store.Config{
			Root: filepath.Join(dir, "hdd"), NVMRoot: filepath.Join(dir, "nvm"), Reserve: func(int64) int64 { return 0 }, WriteBack: true,
		},
		Policy: p, UpperTier: placement.NVM, Poll: 5 * time.Millisecond,
	}
	if d != nil {
		c.Downloads = d
	}
	if change != nil {
		change(&c)
	}
	s, err := New(t.Context(), c)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.NoError(t, unmountAll(s))
	})
	return s
}

func inNamespace(t *testing.T) context.Context { return namespaces.WithNamespace(t.Context(), "test") }

// prepareLayer does what containerd's unpacker does before it stores layer i.
func prepareLayer(t *testing.T, s *Snapshotter, d *downloads, i int, parent string) (key string, mounts []mount.Mount) {
	t.Helper()
	key = fmt.Sprintf("test/%d/extract-%d %s", i+1, i, d.chainID(i))
	mounts, err := s.Prepare(inNamespace(t), key, parent, snapshots.WithLabels(map[string]string{labelRef: d.chainID(i)}))
	require.NoError(t, err)
	return key, mounts
}

func commitLayer(t *testing.T, s *Snapshotter, d *downloads, i int, key string, opts ...snapshots.Opt) string {
	t.Helper()
	name := "test/9/" + d.chainID(i)
	require.NoError(t, s.Commit(inNamespace(t), name, key, opts...))
	return name
}

// unpackImage has all layers stored as containerd does, one after the other.
func unpackImage(t *testing.T, s *Snapshotter, d *downloads) (top string) {
	t.Helper()
	for i := range d.blobs {
		key, mounts := prepareLayer(t, s, d, i, top)
		applied, err := s.Applier().Apply(inNamespace(t), d.desc(i), mounts)
		require.NoError(t, err)
		require.Equal(t, d.img.Layers[i].DiffID, applied.Digest)
		top = commitLayer(t, s, d, i, key)
	}
	return top
}

// inContainer mounts a new container of a snapshot.
func inContainer(t *testing.T, s *Snapshotter, parent string, fn func(root string)) {
	t.Helper()
	key := "test/20/container of " + parent
	mounts, err := s.Prepare(inNamespace(t), key, parent)
	require.NoError(t, err)
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		fn(root)
		return nil
	}))
	require.NoError(t, s.Remove(inNamespace(t), key))
}

func reads(t *testing.T, root string, want map[string]string) {
	t.Helper()
	for name, data := range want {
		got, err := os.ReadFile(filepath.Join(root, name))
		require.NoError(t, err)
		require.Equal(t, data, string(got), name)
	}
}

func upperOf(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if p, ok := strings.CutPrefix(o, "upperdir="); ok {
			return p
		}
	}
	t.Fatalf("no upperdir in %v", mounts)
	return ""
}

// Every policy stores the same image, from its blobs.
func TestPull(t *testing.T) {
	for _, policy := range []string{"drain", "lass", "nvm", "hdd", "boundary=1"} {
		t.Run(policy, func(t *testing.T) {
			big := strings.Repeat("0123456789abcdef", 10_000)
			d := newDownloads(t, []entry{{name: "etc/"}, {name: "etc/a", data: "a"}, {name: "gone", data: "x"}}, []entry{{name: "etc/b", data: big}, {name: ".wh.gone"}})
			s := start(t, t.TempDir(), d, func(c *Config) {
				var err error
				c.Policy, err = placement.ParsePolicy(policy)
				require.NoError(t, err)
			})
			d.arrive(t, 1, 0)
			top := unpackImage(t, s, d)
			inContainer(t, s, top, func(root string) {
				reads(t, root, map[string]string{"etc/a": "a", "etc/b": big})
				require.NoFileExists(t, filepath.Join(root, "gone"))
			})
			var onNVM int64
			for _, l := range s.store.Layers() {
				onNVM += l.NVM
				require.Equal(t, 1, l.Users)
				require.NotEmpty(t, l.Decision)
			}
			if policy != "drain" { // which goes by how fast this machine's disk is
				require.Equal(t, policy != "hdd", onNVM > 0, "%d bytes", onNVM)
			}
		})
	}
}

// All layers of an image begin to be unpacked when the first is asked for.
func TestLayersAreUnpackedBeforeTheyAreAskedFor(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}}, []entry{{name: "b", data: "b"}})
	s := start(t, t.TempDir(), d, nil)
	key, mounts := prepareLayer(t, s, d, 0, "")
	d.arrive(t, 1)
	require.Eventually(t, func() bool {
		l, ok := s.store.Find(d.img.Layers[1].Digest)
		return ok && l.State.Valid()
	}, awaitFor, awaitEvery)
	d.arrive(t, 0)
	_, err := s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
	require.NoError(t, err)
	below := commitLayer(t, s, d, 0, key)
	key, mounts = prepareLayer(t, s, d, 1, below)
	_, err = s.Applier().Apply(inNamespace(t), d.desc(1), mounts)
	require.NoError(t, err)
	commitLayer(t, s, d, 1, key)
	require.Len(t, s.store.Layers(), 2)
}

// Another applier has written the directory: what counts is our own unpacking of
// the same blob, in which implied directories have the attributes of the layer below.
func TestAnotherApplier(t *testing.T) {
	d := newDownloads(t, []entry{{name: "var/", uid: 7}, {name: "var/a", data: "a"}}, []entry{{name: "var/b", data: "b"}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0, 1)
	top := ""
	for i := range d.blobs {
		key, mounts := prepareLayer(t, s, d, i, top)
		require.NoError(t, os.WriteFile(filepath.Join(upperOf(t, mounts), "theirs"), []byte("x"), 0o644))
		top = commitLayer(t, s, d, i, key)
	}
	inContainer(t, s, top, func(root string) {
		reads(t, root, map[string]string{"var/a": "a", "var/b": "b"})
		require.NoFileExists(t, filepath.Join(root, "theirs"))
		st, err := os.Lstat(filepath.Join(root, "var"))
		require.NoError(t, err)
		require.EqualValues(t, 7, statOf(st).Uid)
	})
	require.Eventually(t, func() bool {
		left, err := s.store.Tiers.Staged()
		return err == nil && len(left) == 0
	}, awaitFor, awaitEvery, "their directories go")
}

// Another applier commits the last layer before the daemon has seen that its blob is there. Nobody looks at the downloads
// of a pull that is over: what waits for them must not wait for ever.
func TestPullThatIsOverBeforeItsDownloadsWereSeen(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}}, []entry{{name: "b", data: "b"}})
	lass, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	s := start(t, t.TempDir(), d, func(c *Config) { c.Policy = lass })
	top := ""
	for i := range d.blobs {
		d.fetch(t, i)
		key, _ := prepareLayer(t, s, d, i, top)
		top = commitLayer(t, s, d, i, key)
	}
	inContainer(t, s, top, func(root string) { reads(t, root, map[string]string{"a": "a", "b": "b"}) })
}

// A pull was given up, and another one of the same layer goes on with what the first has begun.
func TestLayerOfAPullThatWasGivenUp(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}})
	lass, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	s := start(t, t.TempDir(), d, func(c *Config) { c.Policy = lass })
	first, _ := prepareLayer(t, s, d, 0, "")
	blob := d.img.Layers[0].Digest
	require.Eventually(t, func() bool { _, ok := s.store.Find(blob); return ok }, awaitFor, awaitEvery)
	s.pulls.mu.Lock()
	given := s.pulls.byKey["test/"+d.img.Manifest.String()]
	s.pulls.mu.Unlock()
	hold, fresh, err := s.store.Begin(t.Context(), store.Spec{Namespace: "test", Blob: blob, Size: d.desc(0).Size})
	require.NoError(t, err)
	require.False(t, fresh)
	defer s.store.Release(hold)
	require.NoError(t, s.Remove(inNamespace(t), first))
	s.pulls.end(given, "given up")
	d.fetch(t, 0)
	ctx, cancel := context.WithTimeout(t.Context(), awaitFor)
	defer cancel()
	_, err = s.store.Await(ctx, hold)
	require.NoError(t, err)
}

// Layers of images that containerd does not tell of are stored as they were written.
func TestImageThatIsNotKnown(t *testing.T) {
	s := start(t, t.TempDir(), nil, nil)
	chain := digest.FromString("chain").String()
	key := "test/1/extract-1 " + chain
	mounts, err := s.Prepare(inNamespace(t), key, "")
	require.NoError(t, err)
	require.Equal(t, "overlay", mounts[0].Type, "containerd drops whiteouts on anything else")
	require.NoError(t, os.WriteFile(filepath.Join(upperOf(t, mounts), "a"), []byte("a"), 0o644))
	require.NoError(t, s.Commit(inNamespace(t), "test/2/"+chain, key))
	key = "test/3/extract-2 " + digest.FromString("next").String()
	mounts, err = s.Prepare(inNamespace(t), key, "test/2/"+chain)
	require.NoError(t, err)
	require.Len(t, mounts, 2, "it is mounted, so that directories get the attributes of those below")
	require.NoError(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "b"), []byte("b"), 0o644)
	}))
	require.NoError(t, s.Commit(inNamespace(t), "test/4/next", key))
	inContainer(t, s, "test/4/next", func(root string) { reads(t, root, map[string]string{"a": "a", "b": "b"}) })
}

func TestApplyToOthersMounts(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}})
	s := start(t, t.TempDir(), d, nil)
	for _, mounts := range [][]mount.Mount{
		nil,
		{{Type: "bind", Source: "/var/lib/other/1/fs"}},
		{{Type: "overlay", Options: []string{"upperdir=/var/lib/other/1/fs", "lowerdir=/x"}}},
		{{Type: "overlay", Options: []string{"upperdir=" + s.store.Tiers.StagingRoot(placement.NVM) + "/../s"}}},
	} {
		_, err := s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
		require.True(t, errdefs.IsNotImplemented(err), "containerd asks the next differ: %v", err)
	}
}

// A blob that is not what the image says fails the pull, and the next try can succeed.
func TestBadBlobFailsThePullOnly(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}})
	s := start(t, t.TempDir(), d, nil)
	right := d.img.Layers[0].DiffID
	d.img.Layers[0].DiffID = digest.FromString("x")
	d.arrive(t, 0)
	key, mounts := prepareLayer(t, s, d, 0, "")
	_, err := s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
	require.ErrorContains(t, err, "diff ID")
	require.NoError(t, s.Remove(inNamespace(t), key))
	d.img.Layers[0].DiffID = right
	top := unpackImage(t, s, d)
	inContainer(t, s, top, func(root string) { reads(t, root, map[string]string{"a": "a"}) })
}

func TestExtractionOfAnEarlierRun(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}})
	dir := t.TempDir()
	s := start(t, dir, d, nil)
	key, mounts := prepareLayer(t, s, d, 0, "")
	require.NoError(t, s.Close())
	s = start(t, dir, d, nil)
	d.arrive(t, 0)
	_, err := s.Applier().Apply(inNamespace(t), d.desc(0), mounts)
	require.NoError(t, err)
	top := commitLayer(t, s, d, 0, key)
	inContainer(t, s, top, func(root string) { reads(t, root, map[string]string{"a": "a"}) })
}

func TestRemovedImageLeavesNothing(t *testing.T) {
	d := newDownloads(t, []entry{{name: "a", data: "a"}}, []entry{{name: "b", data: "b"}})
	s := start(t, t.TempDir(), d, nil)
	d.arrive(t, 0, 1)
	top := unpackImage(t, s, d)
	inContainer(t, s, top, func(string) {})
	require.NoError(t, s.Remove(inNamespace(t), top))
	require.NoError(t, s.Remove(inNamespace(t), "test/9/"+d.chainID(0)))
	require.NoError(t, s.Cleanup(inNamespace(t)))
	require.Empty(t, s.store.Layers())
	for _, dir := range []string{
		filepath.Join(s.config.Store.Root, "p"), filepath.Join(s.config.Store.Root, "s"), filepath.Join(s.config.Store.NVMRoot, "v"),
		filepath.Join(s.config.Store.NVMRoot, "d"), s.store.StatePath("v"),
	} {
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left, dir)
	}
}
