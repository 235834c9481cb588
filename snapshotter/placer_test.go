// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// downloads plays containerd's part in the placer's decisions: blobs arrive
// when the test says so. What the real one does is tested with the real one.
type downloads struct {
	mu     sync.Mutex
	img    *pull.Image
	layers []placement.Layer
	wake   chan struct{}
	blobs  map[string][]byte // chain id -> tar
}

func newDownloads(sizes ...int64) *downloads {
	d := &downloads{
		img:  &pull.Image{Namespace: "test", Manifest: digest.FromString("manifest"), Name: "registry/image:1"},
		wake: make(chan struct{}, 1), blobs: map[string][]byte{},
	}
	for i, n := range sizes {
		dg := digest.FromString(fmt.Sprint("layer", i))
		d.img.Layers = append(d.img.Layers, pull.LayerInfo{Digest: dg, DiffID: dg, ChainID: digest.FromString(fmt.Sprint("chain", i)), Size: n})
		d.layers = append(d.layers, placement.Layer{Digest: dg.String(), Compressed: n, Uncompressed: 2 * n, Exact: true})
	}
	return d
}

func (d *downloads) chainID(i int) string { return d.img.Layers[i].ChainID.String() }

func (d *downloads) arrive(i int) {
	d.mu.Lock()
	d.layers[i].Downloaded, d.layers[i].Offset, d.layers[i].Arrived = true, d.layers[i].Compressed, time.Now()
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
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

func (d *downloads) OpenLayer(_ context.Context, _, chainID string) (pull.LayerInfo, io.ReadCloser, error) {
	b, ok := d.blobs[chainID]
	if !ok {
		return pull.LayerInfo{}, nil, fmt.Errorf("layer %s: %w", chainID, errdefs.ErrNotFound)
	}
	return pull.LayerInfo{Digest: digest.FromBytes(b), DiffID: digest.FromBytes(b)}, io.NopCloser(strings.NewReader(string(b))), nil
}

// start opens a snapshotter below dir; change may adapt its configuration.
func start(t *testing.T, dir string, change func(*Config)) *Snapshotter {
	t.Helper()
	requireRoot(t)
	p, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	c := Config{
		Root: filepath.Join(dir, "hdd"), NVMRoot: filepath.Join(dir, "nvm"), Policy: p, UpperTier: placement.NVM,
		Poll: 5 * time.Millisecond, Reserve: func(int64) int64 { return 0 },
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
func prepareLayer(t *testing.T, s *Snapshotter, d *downloads, i int, parent string) (key, upper string) {
	t.Helper()
	key = fmt.Sprintf("test/%d/extract-%d %s", i+1, i, d.chainID(i))
	mounts, err := s.Prepare(inNamespace(t), key, parent, snapshots.WithLabels(map[string]string{labelRef: d.chainID(i)}))
	require.NoError(t, err)
	return key, upperOf(t, mounts)
}

func upperOf(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	require.Len(t, mounts, 1)
	require.Equal(t, "overlay", mounts[0].Type, "containerd drops whiteouts on anything else")
	for _, o := range mounts[0].Options {
		if p, ok := strings.CutPrefix(o, "upperdir="); ok {
			return p
		}
	}
	t.Fatalf("no upperdir in %v", mounts)
	return ""
}

func commitLayer(t *testing.T, s *Snapshotter, d *downloads, i int, key string, opts ...snapshots.Opt) string {
	t.Helper()
	name := "test/9/" + d.chainID(i)
	require.NoError(t, s.Commit(inNamespace(t), name, key, opts...))
	return name
}

// tierOf tells where a path through the link leads.
func tierOf(t *testing.T, s *Snapshotter, upper string) placement.Tier {
	t.Helper()
	real, err := filepath.EvalSymlinks(upper)
	require.NoError(t, err)
	if strings.HasPrefix(real, s.tiers.Root(placement.NVM)+"/") {
		return placement.NVM
	}
	return placement.HDD
}

// becomes waits for the placer to have changed its mind.
func becomes(t *testing.T, s *Snapshotter, upper string, want placement.Tier) {
	t.Helper()
	require.Eventually(t, func() bool {
		real, err := filepath.EvalSymlinks(upper)
		return err == nil && strings.HasPrefix(real, s.tiers.Root(want)+"/")
	}, 10*time.Second, time.Millisecond, "the layer should stand on %s", want)
}

// The layer that downloads last goes to NVM, with those above; the decision
// falls when the last other download ends, after Prepare.
func TestLateBinding(t *testing.T) {
	d := newDownloads(1000, 1000, 1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })

	key0, upper0 := prepareLayer(t, s, d, 0, "")
	require.Equal(t, placement.HDD, tierOf(t, s, upper0), "others are downloading")
	d.arrive(0) // storing begins
	require.NoError(t, os.WriteFile(filepath.Join(upper0, "f"), []byte("0"), 0o644))
	name0 := commitLayer(t, s, d, 0, key0)

	key1, upper1 := prepareLayer(t, s, d, 1, name0)
	require.Equal(t, placement.HDD, tierOf(t, s, upper1))
	d.arrive(2)
	becomes(t, s, upper1, placement.NVM)
	d.arrive(1)
	require.NoError(t, os.WriteFile(filepath.Join(upper1, "f"), []byte("1"), 0o644))
	name1 := commitLayer(t, s, d, 1, key1)

	key2, upper2 := prepareLayer(t, s, d, 2, name1)
	require.Equal(t, placement.NVM, tierOf(t, s, upper2))
	name2 := commitLayer(t, s, d, 2, key2)

	sub, err := backend{s}.subject(inNamespace(t), name2, "")
	require.NoError(t, err)
	var got []string
	for _, l := range sub.messages() {
		require.NotNil(t, l.Decision, "layer %d has no decision", l.Index)
		require.Equal(t, l.Tier, l.Decision.Tier)
		got = append(got, l.Tier)
	}
	require.Equal(t, []string{"hdd", "nvm", "nvm"}, got)
	require.EqualValues(t, 1, sub.messages()[1].Decision.Swings)
	require.True(t, sub.messages()[1].Ldl)
	require.False(t, s.placer.busy())
}

// With parallel unpacking (containerd's capability rebase) a layer that is stored
// before the last download ends needs no NVM, even if it is above the LDL.
func TestLateBindingInParallel(t *testing.T) {
	d := newDownloads(1000, 1000, 1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	var keys, uppers []string
	for i := range 3 {
		key, upper := prepareLayer(t, s, d, i, "")
		keys, uppers = append(keys, key), append(uppers, upper)
	}
	d.arrive(2)
	require.Eventually(t, func() bool { // until the placer has seen it and will not touch it again
		s.placer.mu.Lock()
		defer s.placer.mu.Unlock()
		for _, e := range s.placer.active {
			if e.index == 2 {
				return e.bound
			}
		}
		return false
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, os.WriteFile(filepath.Join(uppers[2], "f"), []byte("2"), 0o644))
	d.arrive(0)
	becomes(t, s, uppers[1], placement.NVM)
	require.Equal(t, placement.HDD, tierOf(t, s, uppers[0]))
	require.Equal(t, placement.HDD, tierOf(t, s, uppers[2]))
	d.arrive(1)
	parent := ""
	for i := range 3 {
		opts := []snapshots.Opt{}
		if parent != "" {
			opts = append(opts, snapshots.WithParent(parent))
		}
		parent = commitLayer(t, s, d, i, keys[i], opts...)
	}
	ids, err := s.db.chain(t.Context(), parent)
	require.NoError(t, err)
	require.Len(t, ids, 3)
}

// A layer whose image nobody knows must not fill NVM.
func TestUnknownLayerCountsAsLarge(t *testing.T) {
	dir := t.TempDir()
	root, nvm, clean, err := newTiers(dir, "64m")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, clean()) })
	s := start(t, dir, func(c *Config) { c.Root, c.NVMRoot = root, nvm })
	mounts, err := s.Prepare(inNamespace(t), "test/1/extract-1 "+digest.FromString("unknown").String(), "")
	require.NoError(t, err)
	require.Equal(t, placement.HDD, tierOf(t, s, upperOf(t, mounts)))
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	d := newDownloads(1000, 1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	key, upper := prepareLayer(t, s, d, 0, "")
	require.NoError(t, os.WriteFile(filepath.Join(upper, "f"), []byte("half"), 0o644))
	require.NoError(t, s.Remove(inNamespace(t), key))
	require.NoError(t, s.Cleanup(inNamespace(t)))
	ids, err := s.tiers.IDs()
	require.NoError(t, err)
	require.Empty(t, ids)
}

func TestIsExtraction(t *testing.T) {
	chain, other := digest.FromString("chain").String(), digest.FromString("other").String()
	for _, c := range []struct {
		key    string
		labels map[string]string
		want   bool
		chain  string
	}{
		{"default/3/extract-123-abc " + chain, nil, true, chain},
		{"extract-123-abc " + chain, nil, true, chain},
		{"default/3/extract-1 " + chain, map[string]string{labelRef: other}, true, other},
		{"default/3/pod", map[string]string{labelRef: other}, false, ""}, // an annotation of a pod
		{"default/3/extract-1", nil, false, ""},                          // a name of a container
		{"default/3/extract-1", map[string]string{labelRef: other}, false, ""},
		{"default/3/extract-1 ", nil, false, ""},
		{"default/3/extract-1 2", nil, false, ""},
		{"default/3/extract- " + chain, nil, false, ""},
		{"default/3/extract-1 " + chain + " " + chain, nil, false, ""},
		{"default/3/my-extract-container", nil, false, ""},
		{"default/3/extractor", nil, false, ""},
		{"default/3//tmp/initialC", nil, false, ""},
		{"", nil, false, ""},
	} {
		require.Equal(t, c.want, isExtraction(c.key), c.key)
		if c.want {
			require.Equal(t, c.chain, chainIDOf(c.key, c.labels), c.key)
		}
	}
}

// A container may have any name where a client takes names for ids, and its snapshot is mounted (faasd issue 358).
func TestContainerNamedLikeAnExtraction(t *testing.T) {
	d := newDownloads(1000)
	s := start(t, t.TempDir(), nil)
	key, upper := prepareLayer(t, s, d, 0, "")
	require.NoError(t, os.WriteFile(filepath.Join(upper, "f"), []byte("of the image"), 0o644))
	parent := commitLayer(t, s, d, 0, key)
	mounts, err := s.Prepare(inNamespace(t), "test/7/extract-1", parent)
	require.NoError(t, err)
	root := t.TempDir()
	require.NoError(t, mount.All(mounts, root), "%+v", mounts)
	t.Cleanup(func() { require.NoError(t, mount.UnmountAll(root, 0)) })
	got, err := os.ReadFile(filepath.Join(root, "f"))
	require.NoError(t, err)
	require.Equal(t, "of the image", string(got))
}
