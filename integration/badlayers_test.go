//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// raw is a layer that is the bytes it is made of, good or bad.
type raw struct {
	blob      []byte
	plain     []byte // of which the diffID is told
	mediaType types.MediaType
}

func (l raw) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.blob))
	return h, err
}
func (l raw) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.plain))
	return h, err
}
func (l raw) Size() (int64, error)                { return int64(len(l.blob)), nil }
func (l raw) MediaType() (types.MediaType, error) { return l.mediaType, nil }
func (l raw) Compressed() (io.ReadCloser, error)  { return io.NopCloser(bytes.NewReader(l.blob)), nil }
func (l raw) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.plain)), nil
}

func gzipped(t *testing.T, data ...[]byte) (blob []byte) {
	t.Helper()
	for _, d := range data { // one member each
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(d)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		blob = append(blob, b.Bytes()...)
	}
	return blob
}

func zstandard(t *testing.T, data ...[]byte) (blob []byte) {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	for _, d := range data { // one frame each
		blob = append(blob, w.EncodeAll(d, nil)...)
	}
	return blob
}

// tarred is a tar of entries as they are; a size that a header states is not corrected.
func tarred(t *testing.T, entries ...image.Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, e := range entries {
		w := tar.NewWriter(&b)
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Size == 0 {
			h.Size = int64(len(e.Data))
		}
		require.NoError(t, w.WriteHeader(&h))
		_, err := w.Write(e.Data)
		require.NoError(t, err)
		if h.Size == int64(len(e.Data)) {
			require.NoError(t, w.Flush())
		}
	}
	return append(b.Bytes(), make([]byte, 1024)...)
}

// header is that of one entry whose data do not follow.
func header(typeflag byte, size int64) []byte {
	b := make([]byte, 512)
	copy(b, "x")
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00%011o\x00        ", size, 0))
	b[156] = typeflag
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// zeros is one zstd frame of a head and n zeros, 4 bytes for each 128 KiB of them (RFC 8878, section 3.1.1).
func zeros(head []byte, n int) []byte {
	const block = 128 << 10
	b := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3}, byte(len(head)<<3), byte(len(head)>>5), byte(len(head)>>13))
	b = append(b, head...)
	for ; n > 0; n -= block {
		size := min(n, block)
		b = append(b, byte(size<<3|1<<1), byte(size>>5), byte(size>>13), 0)
	}
	return append(b, 1, 0, 0)
}

// A layer that is no layer is refused in one line that says what is wrong with it. What is stored stays as it is, nothing is
// left behind, and an image of that name that is right can be pulled afterwards.
func TestBadLayers(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: calm})
	good := tarred(t, plain("good", bytes.Repeat([]byte("good"), 20_000)))
	_, err := r.PushTiny(ctx, "other:1", app(1))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "other:1"))
	inOrder(t, r)
	packs := func() (names []string) {
		paths, err := filepath.Glob(filepath.Join(r.HDD, "p", "*"))
		require.NoError(t, err)
		return paths
	}
	kept := packs()
	before := print(t, kept...)
	gz, zs := gzipped(t, good), zstandard(t, good)
	for _, c := range []struct {
		name string
		raw
		says string
	}{
		{"diffID", raw{gzipped(t, append(bytes.Clone(good), 1)), append(bytes.Clone(good), 2), types.OCILayer}, "diff ID"},
		{"gzip truncated", raw{gz[:len(gz)-10], good, types.OCILayer}, "unexpected EOF"},
		{"gzip and garbage", raw{append(bytes.Clone(gz), "garbage"...), good, types.OCILayer}, "decompress"},
		{"zstd truncated", raw{zs[:len(zs)-10], good, types.OCILayerZStd}, "decompress"},
		{"zstd and garbage", raw{append(bytes.Clone(zs), "garbage"...), good, types.OCILayerZStd}, "decompress"},
		{"zstd bomb", raw{zeros(header('0', 2<<30), 2<<30), good, types.OCILayerZStd}, "10000:1"},
		{"PAX header of 1 GiB", raw{zeros(header('x', 1<<30), 1<<30), good, types.OCILayerZStd}, "read entry 1"},
		{"name of 300 bytes", raw{gzipped(t, tarred(t, plain(strings.Repeat("n", 300), nil))), tarred(t, plain(strings.Repeat("n", 300), nil)), types.OCILayer}, "name too long"},
		{"size that lies", raw{gzipped(t, append(header('0', 4000), make([]byte, 1024)...)), nil, types.OCILayer}, "data ends after"},
		{"no tar", raw{gzipped(t, bytes.Repeat([]byte("no tar "), 1000)), nil, types.OCILayer}, "read entry 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := soon(t)
			_, err := r.PushBusybox(ctx, "bad:1", c.raw)
			require.NoError(t, err)
			_, err = r.Ctr(ctx, "images", "pull", "--plain-http", r.Ref("bad:1"))
			require.ErrorContains(t, err, c.says)
			require.Equal(t, 1, strings.Count(err.Error(), "ctr: "), "%v", err)
			line := said(err)
			require.NotContains(t, line, "\n")
			require.Less(t, len(line), 1000)
			// The same name, and content that is right.
			_, err = r.PushBusybox(ctx, "bad:1", raw{gz, good, types.OCILayer})
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "bad:1"))
			require.Equal(t, strings.Repeat("good", 20_000), run(t, r, "bad:1", "cat", "/good"))
			removeImage(t, r, "bad:1")
			inOrder(t, r)
			await(t, func(context.Context) error { // containerd collects what was removed
				if now := packs(); !slices.Equal(kept, now) {
					return fmt.Errorf("%q are stored", now)
				}
				return nil
			})
			require.Equal(t, before, print(t, kept...), "nothing stored is touched")
		})
	}
	removeImage(t, r, "other:1")
	collect(t, r, "other:1")
}

// said is what ctr says of an error, without its warnings.
func said(err error) string { return err.Error()[strings.Index(err.Error(), "ctr: "):] }

// Layers that look odd and are right.
func TestOddLayers(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: calm})
	good := tarred(t, plain("../../climbs", []byte("1")), plain("/absolute", []byte("2")), plain("a/../../b", []byte("3")),
		symlink("out", "../../../../etc"), plain("out/inside", []byte("4")))
	half := len(good) / 2
	for name, l := range map[string]raw{
		"plain":        {good, good, types.OCIUncompressedLayer},
		"gzip members": {gzipped(t, good[:half], good[half:], nil), good, types.OCILayer},
		"zstd frames":  {zstandard(t, good[:half], good[half:]), good, types.OCILayerZStd},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.PushBusybox(ctx, "odd:1", l)
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "odd:1"))
			require.Equal(t, "1234", run(t, r, "odd:1", "cat", "/climbs", "/absolute", "/b", "/etc/inside"))
			removeImage(t, r, "odd:1")
		})
	}
	awaitEmpty(t, r)
}

// What the registry or the way from it spoils is refused too, and the same pull succeeds when it is right again.
func TestBlobSpoiledOnItsWay(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: calm})
	img, err := r.PushTiny(ctx, "app:1", app(2))
	require.NoError(t, err)
	digest := blobs(t, img)[2]
	path := filepath.Join(r.Dir, "registry", strings.Replace(digest, ":", "/", 1))
	right, err := os.ReadFile(path)
	require.NoError(t, err)
	for name, spoilt := range map[string][]byte{
		"last byte": append(bytes.Clone(right[:len(right)-1]), right[len(right)-1]^1),
		"cut off":   right[:len(right)-100],
		"longer":    append(bytes.Clone(right), "more"...),
	} {
		t.Run(name, func(t *testing.T) {
			ctx := soon(t)
			require.NoError(t, os.WriteFile(path, spoilt, 0o600))
			_, err := r.Ctr(ctx, "images", "pull", "--plain-http", r.Ref("app:1"))
			require.Error(t, err)
			require.Equal(t, 1, strings.Count(err.Error(), "ctr: "), "%v", err)
			for _, l := range stored(t, r) {
				require.NotEqual(t, digest, l)
			}
			require.NoError(t, os.WriteFile(path, right, 0o600))
			collectIngests(t, r)
			require.NoError(t, r.Pull(ctx, "app:1"))
			require.Equal(t, contentSum(t, 2, 3), run(t, r, "app:1", "sh", "-c", allContent))
			inOrder(t, r)
			removeImage(t, r, "app:1")
			collect(t, r, "app:1")
		})
	}
}

// collectIngests has containerd collect what a failed pull has left in its content store. A download that has its size but
// not its digest is not begun anew: each pull fails on it until containerd has thrown it away.
func collectIngests(t *testing.T, r *rig.Rig) {
	t.Helper()
	c, err := r.Client()
	require.NoError(t, err)
	ctx := r.Context(soon(t))
	await(t, func(context.Context) error {
		lease, err := c.LeasesService().Create(ctx, leases.WithRandomID())
		if err != nil {
			return err
		}
		if err := c.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
			return err
		}
		ingests, err := c.ContentStore().ListStatuses(ctx)
		if err == nil && len(ingests) > 0 {
			err = fmt.Errorf("ingests left over: %v", ingests)
		}
		return err
	})
}

// stored are the blobs of which a layer is stored, by the database.
func stored(t *testing.T, r *rig.Rig) (digests []string) {
	t.Helper()
	for _, l := range readBooks(t, r).layers {
		if l.State != "unpacking" {
			digests = append(digests, l.Blob)
		}
	}
	return digests
}

// The HDD is full in the middle of a pack: the pull fails with that word, and nothing else is hurt.
func TestHDDFullInAPack(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	disk, err := hddsim.Start(ctx, hddsim.Options{Dir: filepath.Join(t.TempDir(), "disk"), Size: 64 << 20, Model: &hddsim.Model{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, disk.Close()) })
	r := newRig(t, rig.Options{HDD: filepath.Join(disk.Mountpoint(), "nhybrid"), DaemonArgs: append([]string{"--set", "placement.policy=hdd"}, calm...)})
	_, err = r.PushTiny(ctx, "other:1", app(1))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "other:1"))
	_, err = r.PushTiny(ctx, "large:1", image.TinySpec{Runnable: true, Layers: []int64{half, 40 << 20, half}})
	require.NoError(t, err)
	ballast := filepath.Join(disk.Mountpoint(), "ballast")
	f, err := os.Create(ballast)
	require.NoError(t, err)
	require.NoError(t, unix.Fallocate(int(f.Fd()), 0, 0, 20<<20))
	require.NoError(t, f.Close())
	_, err = r.Ctr(ctx, "images", "pull", "--plain-http", r.Ref("large:1"))
	require.ErrorContains(t, err, "no space left on device")
	require.Equal(t, 1, strings.Count(err.Error(), "ctr: "), "%v", err)
	require.NotContains(t, said(err), "\n")
	require.Equal(t, contentSum(t, 1, 3), run(t, r, "other:1", "sh", "-c", allContent))
	inOrder(t, r)
	require.NoError(t, os.Remove(ballast))
	require.NoError(t, r.Pull(ctx, "large:1"))
	require.Equal(t, fmt.Sprint(40<<20), run(t, r, "large:1", "sh", "-c", "cat /data/1/* | wc -c"))
	removeImage(t, r, "other:1")
	removeImage(t, r, "large:1")
	collect(t, r, "large:1")
}
