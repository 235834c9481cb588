// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	registryname "github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/link"
	"github.com/nhybrid/nhybrid/placement"
)

func watch(t *testing.T, d *daemon) *Watcher {
	t.Helper()
	w := New(d.address)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		assert.ErrorIs(t, <-done, context.Canceled)
		assert.NoError(t, w.Close())
		_, _, err := w.Find(context.Background(), "x", digest.FromString("x").String(), nil)
		assert.True(t, errdefs.IsUnavailable(err), "closed: %v", err)
	})
	return w
}

// TestContainerd runs against one real containerd; each part has a namespace and a registry of its own.
func TestContainerd(t *testing.T) {
	d := newDaemon(t)
	w := watch(t, d)
	for _, part := range []struct {
		name string
		test func(*testing.T, *daemon, *Watcher)
	}{
		{"pull", testPull}, {"shared layers", testShared}, {"hints", testHints}, {"index", testIndex}, {"platforms", testPlatforms}, {"provider", testProvider}, {"fetch", testFetch}, {"restart", testRestart},
	} {
		t.Run(part.name, func(t *testing.T) {
			d.t = t // what fails now fails here
			part.test(t, d, w)
		})
	}
}

// testPull holds the three layers of an image back at chosen bytes, lets them go in a chosen order and looks on.
func testPull(t *testing.T, d *daemon, w *Watcher) {
	const ns = "pull"
	s := newSource(t)
	img := s.push("app:1", 200_000, 3_000_000, 300_000)
	held := []int64{64 << 10, 5 << 19, 0}
	seen := []int64{0, 2 << 20, 0} // whole MiB
	var release []func()
	for i, b := range img.blobs {
		release = append(release, s.link.Hold(b, held[i]))
	}
	wake, stop := w.Subscribe(ns)
	defer stop()
	other, stopOther := w.Subscribe("another")
	defer stopOther()
	wait := d.pull(ns, s.host+"/app:1")
	for i, b := range img.blobs {
		s.await(link.Reached(b, held[i]))
	}

	found, index, err := w.Find(t.Context(), ns, img.chain[1], nil)
	require.NoError(t, err)
	assert.Equal(t, 1, index)
	assert.Equal(t, img.digest, found.Manifest.String())
	assert.Equal(t, "127.0.0.1/app@"+img.digest, found.Name, "no image record yet, so where it comes from")
	assert.False(t, found.Recorded)
	assert.Equal(t, []string{"RUN step 0", "RUN step 1", "RUN step 2"}, found.History)
	assert.WithinDuration(t, time.Now(), found.Started, time.Minute)
	for i, l := range found.Layers {
		assert.Equal(t, img.blobs[i], l.Digest.String())
		assert.Equal(t, img.chain[i], l.ChainID.String())
		assert.Equal(t, img.sizes[i], l.Size)
	}

	progress := func() []placement.Layer {
		t.Helper()
		p, err := w.Progress(t.Context(), found)
		require.NoError(t, err)
		require.Len(t, p, 3)
		return p
	}
	d.eventually("the bytes that the link let through are seen", func() bool {
		p := progress()
		return p[0].Offset == seen[0] && p[1].Offset == seen[1] && p[2].Offset == seen[2]
	})
	for i, l := range progress() {
		assert.False(t, l.Downloaded || l.Exact, i)
		assert.Equal(t, placement.EstimateUncompressed(img.sizes[i]), l.Uncompressed)
	}
	assert.Equal(t, seen[1], Received(progress()))

	// What runs before an arrival wakes too: take it away, so that the next is the arrival.
	select {
	case <-wake:
	default:
	}
	release[2]()
	d.eventually("an arrival wakes the subscriber and is then seen", func() bool {
		select {
		case <-wake:
		case <-time.After(patience):
			t.Fatal("no wake-up")
		}
		return progress()[2].Downloaded
	})
	p := progress()
	assert.True(t, p[2].Exact)
	assert.EqualValues(t, img.tars[2], p[2].Uncompressed)
	assert.Equal(t, img.sizes[2], p[2].Offset)
	assert.False(t, p[0].Downloaded || p[1].Downloaded)
	policy, err := placement.ParsePolicy("lass")
	require.NoError(t, err)
	assert.Equal(t, placement.HDD, policy.Decide(placement.Input{Index: 2, Layers: p, NVMFree: 1 << 40}).Tier)

	release[1]()
	d.eventually("layer 1 arrives", func() bool { return progress()[1].Downloaded })
	assert.False(t, progress()[0].Downloaded)
	release[0]()
	wait()
	p = progress()
	dec := policy.Decide(placement.Input{Index: 0, Layers: p, NVMFree: 1 << 40})
	assert.Equal(t, 0, dec.LDL, "the smallest layer came last, and that is seen: %s", dec.Reason)
	assert.Equal(t, placement.NVM, dec.Tier)
	for i, l := range p {
		assert.True(t, l.Downloaded && l.Exact, i)
		assert.EqualValues(t, img.tars[i], l.Uncompressed)
	}

	again, _, err := w.Find(t.Context(), ns, img.chain[2], nil)
	require.NoError(t, err)
	assert.Equal(t, s.host+"/app:1", again.Name, "now there is an image record")
	assert.True(t, again.Recorded)
	select {
	case <-other:
		// The wake-up after connecting is for all; there may have been one, but no second.
		select {
		case <-other:
			t.Error("woken by another namespace")
		default:
		}
	default:
	}

	// A layer that was seen stays, though its blob goes (discard_unpacked_layers).
	for _, b := range img.blobs {
		d.run(ns, "content", "rm", b)
	}
	assert.Equal(t, p, progress())
	fresh, err := w.Progress(t.Context(), again)
	require.NoError(t, err)
	assert.False(t, fresh[0].Downloaded)
}

func testShared(t *testing.T, d *daemon, w *Watcher) {
	const ns = "shared"
	s := newSource(t)
	old, now := s.push("old:1", 5000, 6000), s.push("now:1", 5000, 7000, 210_000) // a blob of another namespace would come without a download
	require.Equal(t, old.chain[0], now.chain[0])
	d.pull(ns, s.host+"/old:1")()
	found, _, err := w.Find(t.Context(), ns, now.chain[0], nil)
	require.NoError(t, err)
	assert.Equal(t, old.digest, found.Manifest.String())

	release := s.link.Hold(now.blobs[2], 1000)
	wait := d.pull(ns, s.host+"/now:1")
	s.await(link.Reached(now.blobs[2], 1000))
	found, _, err = w.Find(t.Context(), ns, now.chain[0], nil)
	require.NoError(t, err)
	assert.Equal(t, now.digest, found.Manifest.String(), "the one that lacks layers")
	p, err := w.Progress(t.Context(), found)
	require.NoError(t, err)
	assert.True(t, p[0].Downloaded)
	assert.True(t, p[0].Arrived.IsZero(), "it was there before")
	release()
	wait()
	d.pull(ns, s.host+"/old:1")()
	found, _, err = w.Find(t.Context(), ns, now.chain[0], nil)
	require.NoError(t, err)
	assert.Equal(t, now.digest, found.Manifest.String(), "the newest, as both are whole")

	all, err := w.Images(t.Context(), ns)
	require.NoError(t, err)
	require.Len(t, all, 2)
	assert.Equal(t, []string{s.host + "/now:1", s.host + "/old:1"}, []string{all[0].Name, all[1].Name})
	_, _, err = w.Find(t.Context(), "elsewhere", now.chain[0], nil)
	assert.True(t, errdefs.IsNotFound(err), "another namespace: %v", err)
}

func testHints(t *testing.T, d *daemon, w *Watcher) {
	const ns = "hints"
	s := newSource(t)
	a, b := s.push("a:1", 3000), s.push("b:1", 3000, 4000)
	d.pull(ns, s.host+"/a:1")()
	d.pull(ns, s.host+"/b:1")()
	find := func(hints map[string]string) string {
		t.Helper()
		found, index, err := w.Find(t.Context(), ns, a.chain[0], hints)
		require.NoError(t, err)
		assert.Equal(t, 0, index)
		return found.Manifest.String()
	}
	assert.Equal(t, b.digest, find(nil))
	assert.Equal(t, a.digest, find(map[string]string{snapshotters.TargetManifestDigestLabel: a.digest}))
	for _, nonsense := range []string{"", "sha256:1", "../../etc", a.blobs[0], digest.FromString("not there").String()} {
		assert.Equal(t, b.digest, find(map[string]string{snapshotters.TargetManifestDigestLabel: nonsense}), nonsense)
	}
	_, _, err := w.Find(t.Context(), ns, digest.FromString("no such chain").String(), map[string]string{snapshotters.TargetManifestDigestLabel: a.digest})
	assert.True(t, errdefs.IsNotFound(err), err)
	for _, bad := range []string{"", "x", "sha256:zz"} {
		_, _, err := w.Find(t.Context(), ns, bad, nil)
		assert.True(t, errdefs.IsInvalidArgument(err), err)
	}
	_, _, err = w.Find(t.Context(), "", a.chain[0], nil)
	assert.True(t, errdefs.IsInvalidArgument(err), err)

	for _, ref := range []string{s.host + "/a:1", a.digest} {
		assert.Equal(t, []string{a.digest}, lookup(t, w, ns, ref))
	}
	_, err = w.Lookup(t.Context(), ns, "a:1")
	assert.True(t, errdefs.IsNotFound(err), err)
}

func testIndex(t *testing.T, d *daemon, w *Watcher) {
	const ns = "index"
	s := newSource(t)
	img := s.push("part:1", 2000)
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img.image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	ref, err := registryname.ParseReference(s.up+"/whole:1", registryname.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.WriteIndex(ref, index))
	d.pull(ns, s.host+"/whole:1")()
	found, _, err := w.Find(t.Context(), ns, img.chain[0], nil)
	require.NoError(t, err)
	assert.Equal(t, s.host+"/whole:1", found.Name)
	assert.Equal(t, []string{img.digest}, lookup(t, w, ns, s.host+"/whole:1"))
	outer, err := index.Digest()
	require.NoError(t, err)
	assert.Equal(t, []string{img.digest}, lookup(t, w, ns, outer.String()), "the digest of the index")
	_, err = w.Lookup(t.Context(), ns, digest.FromString("not there").String())
	assert.True(t, errdefs.IsNotFound(err), err)
}

// lookup are the digests of what a reference names.
func lookup(t *testing.T, w *Watcher, ns, ref string) (digests []string) {
	t.Helper()
	all, err := w.Lookup(t.Context(), ns, ref)
	require.NoError(t, err)
	for _, i := range all {
		digests = append(digests, i.Manifest.String())
	}
	return digests
}

// testPlatforms has an index as BuildKit makes it, with an image for another platform and an attestation, in an index of its
// own. The other platform's image has one layer more, and is older or newer in the content store, as chance has it.
func testPlatforms(t *testing.T, d *daemon, w *Watcher) {
	const ns = "platforms"
	s := newSource(t)
	img := s.push("part:1", 2000)
	made, err := img.image.ConfigFile()
	require.NoError(t, err)
	made = made.DeepCopy()
	made.Architecture = runtime.GOARCH
	native, err := mutate.ConfigFile(img.image, made)
	require.NoError(t, err)
	want, err := native.Digest()
	require.NoError(t, err)
	above, _ := layerOf(t, 300)
	other, err := mutate.Append(img.image, mutate.Addendum{Layer: above, MediaType: types.OCILayer})
	require.NoError(t, err)
	config, err := other.ConfigFile()
	require.NoError(t, err)
	config = config.DeepCopy()
	config.Architecture = "s390x"
	other, err = mutate.ConfigFile(other, config)
	require.NoError(t, err)
	foreign, err := other.Digest()
	require.NoError(t, err)
	unknown := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	unknown, err = mutate.Append(unknown, mutate.Addendum{Layer: static.NewLayer([]byte("{}"), "application/vnd.in-toto+json")})
	require.NoError(t, err)
	platform := func(os, architecture string) v1.Descriptor {
		return v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: architecture}}
	}
	inner := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: unknown, Descriptor: platform("unknown", "unknown")},
		mutate.IndexAddendum{Add: other, Descriptor: platform("linux", "s390x")},
		mutate.IndexAddendum{Add: native, Descriptor: platform("linux", runtime.GOARCH)})
	outer := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: inner})
	for name, index := range map[string]v1.ImageIndex{"plain:1": inner, "nested:1": outer} {
		ref, err := registryname.ParseReference(s.up+"/"+name, registryname.Insecure)
		require.NoError(t, err)
		require.NoError(t, remote.WriteIndex(ref, index))
		d.run(ns, "content", "fetch", "--plain-http", "--all-platforms", s.host+"/"+name)
		top, err := index.Digest()
		require.NoError(t, err)
		for _, ref := range []string{s.host + "/" + name, top.String()} {
			assert.Equal(t, []string{want.String(), foreign.String()}, lookup(t, w, ns, ref), ref)
		}
	}
	all, err := w.Images(t.Context(), ns)
	require.NoError(t, err)
	assert.Len(t, all, 2, "and no attestation")
	for _, i := range all {
		assert.True(t, i.Recorded)
		assert.Equal(t, s.host+"/nested:1", i.Name, "with the port")
	}
}

func testRestart(t *testing.T, d *daemon, w *Watcher) {
	const ns = "restart"
	s := newSource(t)
	img := s.push("r:1", 3000)
	d.pull(ns, s.host+"/r:1")()
	found, _, err := w.Find(t.Context(), ns, img.chain[0], nil)
	require.NoError(t, err)
	d.stop()
	d.eventually("the loss is noticed", func() bool {
		_, _, err := w.Find(t.Context(), ns, img.chain[0], nil)
		return errdefs.IsUnavailable(err)
	})
	_, err = w.Progress(t.Context(), found)
	assert.True(t, errdefs.IsUnavailable(err), err)
	provider, err := w.Provider(t.Context(), ns)
	require.NoError(t, err)
	_, err = provider.ReaderAt(t.Context(), ocispec.Descriptor{Digest: digest.Digest(img.blobs[0])})
	assert.True(t, errdefs.IsUnavailable(err), err)

	wake, stop := w.Subscribe(ns)
	defer stop()
	d.start()
	select {
	case <-wake:
	case <-time.After(patience):
		t.Fatal("no wake-up after containerd came back")
	}
	d.eventually("calls work again", func() bool {
		_, _, err := w.Find(t.Context(), ns, img.chain[0], nil)
		return err == nil
	})
	p, err := w.Progress(t.Context(), found)
	require.NoError(t, err)
	assert.True(t, p[0].Downloaded)
	// The stream of events is back too.
	next := s.push("r:2", 3500)
	d.pull(ns, s.host+"/r:2")()
	d.eventually("events come again", func() bool {
		select {
		case <-wake:
		case <-time.After(patience):
			t.Fatal("no event")
		}
		_, _, err := w.Find(t.Context(), ns, next.chain[0], nil)
		return err == nil
	})
}

func TestAbsent(t *testing.T) {
	w := New(filepath.Join(t.TempDir(), "no.sock"))
	defer w.Close()
	chain := digest.FromString("x").String()
	for range 3 {
		_, _, err := w.Find(t.Context(), "n", chain, nil)
		assert.True(t, errdefs.IsUnavailable(err), err)
	}
	_, err := w.Images(t.Context(), "n")
	assert.True(t, errdefs.IsUnavailable(err), err)
	_, err = w.Lookup(t.Context(), "n", "x")
	assert.True(t, errdefs.IsUnavailable(err), err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	assert.ErrorIs(t, w.Run(ctx), context.DeadlineExceeded, "Run waits for containerd to come")
}

func TestNotify(t *testing.T) {
	w := New("/nowhere")
	a, stopA := w.Subscribe("a")
	all, stopAll := w.Subscribe("")
	woken := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	w.notify("a")
	w.notify("a") // merged
	assert.True(t, woken(a) && woken(all))
	assert.False(t, woken(a) || woken(all))
	w.notify("b")
	assert.False(t, woken(a))
	assert.True(t, woken(all))
	w.notify("")
	assert.True(t, woken(a) && woken(all))
	stopA()
	stopAll()
	w.notify("")
	assert.False(t, woken(a) || woken(all))
}
