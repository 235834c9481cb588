// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// downloads plays containerd's part in pulls on a real content store: blobs arrive
// when the test says so. What the real one does is tested with the real one.
type downloads struct {
	content.Store
	root  string
	img   *pull.Image
	blobs [][]byte
	wake  chan struct{}

	mu     sync.Mutex
	layers []placement.Layer
}

// entry is one entry of a layer.
type entry struct {
	name string
	data string // "" for a directory if the name ends in a slash
	uid  int
}

func newDownloads(t *testing.T, layers ...[]entry) *downloads {
	t.Helper()
	d := &downloads{root: t.TempDir(), wake: make(chan struct{}, 1)}
	var err error
	d.Store, err = local.NewStore(d.root)
	require.NoError(t, err)
	d.img = &pull.Image{Namespace: "test", Manifest: digest.FromString(t.Name()), Name: "registry/image:1"}
	var diffIDs []digest.Digest
	for _, entries := range layers {
		var plain, blob bytes.Buffer
		w := tar.NewWriter(&plain)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Uid: e.uid, Gid: e.uid, Typeflag: tar.TypeReg, ModTime: time.Unix(1, 0)}
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag, h.Mode = tar.TypeDir, 0o755
			}
			require.NoError(t, w.WriteHeader(h))
			_, err := w.Write([]byte(e.data))
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		z := gzip.NewWriter(&blob)
		_, err := z.Write(plain.Bytes())
		require.NoError(t, err)
		require.NoError(t, z.Close())
		diffIDs = append(diffIDs, digest.FromBytes(plain.Bytes()))
		d.blobs = append(d.blobs, blob.Bytes())
		n := int64(blob.Len())
		d.img.Layers = append(d.img.Layers, pull.LayerInfo{
			Digest: digest.FromBytes(blob.Bytes()), DiffID: digest.FromBytes(plain.Bytes()), ChainID: identity.ChainID(diffIDs), Size: n, MediaType: ocispec.MediaTypeImageLayerGzip,
		})
		d.layers = append(d.layers, placement.Layer{Digest: digest.FromBytes(blob.Bytes()).String(), Compressed: n})
	}
	return d
}

func (d *downloads) chainID(i int) string { return d.img.Layers[i].ChainID.String() }

func (d *downloads) desc(i int) ocispec.Descriptor {
	l := d.img.Layers[i]
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size}
}

// fetch brings the blob of a layer, and tells nobody.
func (d *downloads) fetch(t *testing.T, i int) {
	t.Helper()
	desc := d.desc(i)
	require.NoError(t, content.WriteBlob(t.Context(), d.Store, "layer-"+desc.Digest.String(), bytes.NewReader(d.blobs[i]), desc))
}

// arrive brings the blob of a layer, or of all.
func (d *downloads) arrive(t *testing.T, layers ...int) {
	t.Helper()
	for _, i := range layers {
		d.fetch(t, i)
		d.mu.Lock()
		d.layers[i].Downloaded, d.layers[i].Offset, d.layers[i].Arrived = true, d.layers[i].Compressed, time.Now()
		d.mu.Unlock()
		select {
		case d.wake <- struct{}{}:
		default:
		}
	}
}

func (d *downloads) Find(_ context.Context, ns, chainID string, _ map[string]string) (*pull.Image, int, error) {
	if i := d.img.Index(digest.Digest(chainID)); i >= 0 && ns == d.img.Namespace {
		return d.img, i, nil
	}
	return nil, 0, errdefs.ErrNotFound
}

func (d *downloads) Progress(context.Context, *pull.Image) ([]placement.Layer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]placement.Layer(nil), d.layers...), nil
}

func (d *downloads) Subscribe(string) (<-chan struct{}, func()) { return d.wake, func() {} }

func (d *downloads) ContentRoot(context.Context) string { return d.root }

func (d *downloads) Fetch(context.Context, []string, ocispec.Descriptor) (io.ReadCloser, string, error) {
	return nil, "", errdefs.ErrNotFound
}

func (d *downloads) Provider(context.Context, string) (content.Provider, error) { return d.Store, nil }

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
