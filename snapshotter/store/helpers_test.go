// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// blobs is a content store on this machine.
type blobs struct {
	root string
	content.Store
	hidden bool   // its directory cannot be read from here
	seenAs string // its directory is another one here, "" for the same
	in     string // the namespace that has the blobs, "": all
	// registry answers Fetch; nil: no image has the blob.
	registry func(context.Context) (io.ReadCloser, error)

	mu    sync.Mutex
	wakes []chan struct{}
}

func (b *blobs) Fetch(ctx context.Context, _ []string, blob ocispec.Descriptor) (io.ReadCloser, string, error) {
	if b.registry == nil {
		return nil, "", fmt.Errorf("fetch blob %s: no image has it: %w", blob.Digest, errdefs.ErrNotFound)
	}
	r, err := b.registry(ctx)
	return r, "registry/app:1", err
}

func newBlobs(t *testing.T) *blobs {
	t.Helper()
	root := t.TempDir()
	s, err := local.NewStore(root)
	require.NoError(t, err)
	return &blobs{root: root, Store: s}
}

func (b *blobs) ContentRoot(context.Context) string {
	if b.hidden {
		return ""
	}
	if b.seenAs != "" {
		return b.seenAs
	}
	return b.root
}

func (b *blobs) Provider(_ context.Context, ns string) (content.Provider, error) {
	if b.in != "" && b.in != ns {
		return local.NewStore(filepath.Join(b.root, "..", "empty"))
	}
	return b.Store, nil
}

func (b *blobs) Subscribe(string) (<-chan struct{}, func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := make(chan struct{}, 1)
	b.wakes = append(b.wakes, c)
	return c, func() {}
}

// tell says that something has arrived.
func (b *blobs) tell() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.wakes {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// write puts a blob there.
func (b *blobs) write(t *testing.T, blob []byte) {
	t.Helper()
	d := desc(blob)
	require.NoError(t, content.WriteBlob(t.Context(), b.Store, "layer-"+d.Digest.String(), bytes.NewReader(blob), d))
}

func desc(blob []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

// file is one entry of a layer in the making.
type file struct {
	name string
	data []byte
}

// layerOf is a blob with the given files, and its diffID.
func layerOf(t *testing.T, files ...file) ([]byte, digest.Digest) {
	t.Helper()
	var plain, blob bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(f.data)), ModTime: time.Unix(1, 0)}
		if f.data == nil {
			h.Mode, h.Typeflag = 0o755, tar.TypeDir
		}
		require.NoError(t, w.WriteHeader(h))
		_, err := w.Write(f.data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	z := gzip.NewWriter(&blob)
	_, err := z.Write(plain.Bytes())
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return blob.Bytes(), digest.FromBytes(plain.Bytes())
}

// large is data that no two files share.
func large(seed string, n int) []byte {
	b := make([]byte, 0, n+64)
	for i := 0; len(b) < n; i++ {
		b = fmt.Appendf(b, "%s %d\n", seed, i)
	}
	return b[:n]
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// bench is a machine with two tiers.
type bench struct {
	t     *testing.T
	dir   string
	blobs *blobs
	s     *Store
}

// newBench mounts a tmpfs as NVM. Each test may open the store as often as it likes.
func newBench(t *testing.T) *bench {
	t.Helper()
	requireRoot(t)
	b := &bench{t: t, dir: t.TempDir(), blobs: newBlobs(t)}
	mnt := filepath.Join(b.dir, "nvm")
	require.NoError(t, os.Mkdir(mnt, 0o755))
	require.NoError(t, unix.Mount("tmpfs", mnt, "tmpfs", 0, "mode=755,size=256m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(mnt, unix.MNT_DETACH)) })
	return b
}

func (b *bench) open(change func(*Config)) *Store {
	b.t.Helper()
	c := Config{Root: filepath.Join(b.dir, "hdd"), NVMRoot: filepath.Join(b.dir, "nvm", "n"), Blobs: b.blobs, WriteBack: true}
	if change != nil {
		change(&c)
	}
	s, err := Open(b.t.Context(), c, nil)
	require.NoError(b.t, err)
	b.s = s
	b.t.Cleanup(func() {
		require.NoError(b.t, s.Close())
		for _, d := range []string{"v", "i", "p"} {
			points, _ := filepath.Glob(s.StatePath(d, "*"))
			for _, p := range points {
				if pack.Mounted(p) {
					require.NoError(b.t, unix.Unmount(p, unix.MNT_DETACH))
				}
			}
		}
	})
	return s
}

// spec is the unpacking of a blob.
func spec(blob []byte, diffID digest.Digest, to unpack.Placement) Spec {
	d := desc(blob)
	return Spec{Namespace: "default", Blob: d.Digest, Size: d.Size, MediaType: d.MediaType, DiffID: diffID,
		Place: func(unpack.File) unpack.Placement { return to }}
}

// commit makes a committed snapshot of a layer, on a parent or on nothing.
func (b *bench) commit(name, parent string, layer LayerID) (id string) {
	b.t.Helper()
	var changed []LayerID
	require.NoError(b.t, b.s.UpdateTx(b.t.Context(), func(ctx context.Context, tx *bolt.Tx) error {
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, name+"-active", parent)
		if err != nil {
			return err
		}
		if err := PutSnapshot(tx, sn.ID, Snapshot{Namespace: "default"}); err != nil {
			return err
		}
		if id, err = storage.CommitActive(ctx, name+"-active", name, snapshots.Usage{}); err != nil {
			return err
		}
		changed, err = b.s.Bind(tx, id, layer)
		return err
	}))
	b.s.Bound(changed)
	return id
}

// remove removes a snapshot.
func (b *bench) remove(name string) {
	b.t.Helper()
	var changed []LayerID
	var id string
	require.NoError(b.t, b.s.UpdateTx(b.t.Context(), func(ctx context.Context, tx *bolt.Tx) (err error) {
		if id, _, err = storage.Remove(ctx, name); err != nil {
			return err
		}
		changed, err = b.s.RemoveSnapshot(tx, id)
		return err
	}))
	b.s.Bound(changed)
	require.NoError(b.t, b.s.RemoveNow(b.t.Context(), id))
}

// state waits for a layer to come to a state.
func (b *bench) state(id LayerID, want State) Layer {
	b.t.Helper()
	var l Layer
	b.eventually("layer "+id.String()+" is "+string(want), func() bool {
		var err error
		l, err = b.s.Layer(id)
		return err == nil && l.State == want && l.Damaged == ""
	})
	return l
}

// gone waits for a layer to be removed.
func (b *bench) gone(id LayerID) {
	b.t.Helper()
	b.eventually("layer "+id.String()+" is gone", func() bool {
		_, err := b.s.Layer(id)
		return errdefs.IsNotFound(err)
	})
	require.NoFileExists(b.t, b.s.PackPath(id))
	require.NoDirExists(b.t, b.s.Tiers.LayerData(id.String()))
}

// idle waits until nothing is done or to be done for any layer.
func (b *bench) idle() {
	b.t.Helper()
	b.eventually("nothing is to be done", func() bool {
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		for _, l := range b.s.layers {
			if l.awaits || l.unpack != nil {
				return false
			}
		}
		return b.s.exec.length() == 0
	})
}

func (b *bench) eventually(what string, ok func() bool) {
	b.t.Helper()
	require.Eventually(b.t, ok, 20*time.Second, time.Millisecond, what)
}

// read reads files as a container would see them, through an overlay.
func (b *bench) read(view string, fn func(root string)) {
	b.t.Helper()
	root := b.t.TempDir()
	f := b.s.Features()
	opts := "lowerdir=" + filepath.Join(view, "t") + "::" + b.s.Tiers.DataRoot() + "::" + filepath.Join(view, "h")
	for _, o := range f.Options() {
		opts += "," + o
	}
	require.NoError(b.t, unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, opts))
	defer func() { require.NoError(b.t, unix.Unmount(root, 0)) }()
	fn(root)
}

func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	require.True(t, err == nil || errors.Is(err, io.EOF))
	b[0] ^= 1
	_, err = f.WriteAt(b, off)
	require.NoError(t, err)
}
