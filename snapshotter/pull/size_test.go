// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"math/rand"
	"testing"

	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

func blobBytes(b []byte) memory { return memory{bytes.NewReader(b)} }

// tarOf returns a tar with one file of n random bytes and then as many zeros.
func tarOf(t testing.TB, n int) []byte {
	t.Helper()
	data := make([]byte, 2*n)
	rand.New(rand.NewSource(int64(n))).Read(data[:n])
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "f", Size: int64(len(data)), Mode: 0o644}))
	_, err := w.Write(data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

func gz(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(p)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

// zst compresses p into one frame that states its size.
func zst(t testing.TB, p []byte, o ...zstd.EOption) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, o...)
	require.NoError(t, err)
	return w.EncodeAll(p, nil)
}

// zstStream compresses p without knowing its size.
func zstStream(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	require.NoError(t, err)
	for len(p) > 0 {
		n := min(len(p), 1000)
		_, err = w.Write(p[:n])
		require.NoError(t, err)
		require.NoError(t, w.Flush())
		p = p[n:]
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func skippable(n int) []byte {
	b := make([]byte, 8+n)
	binary.LittleEndian.PutUint32(b, zstdSkippable+3)
	binary.LittleEndian.PutUint32(b[4:], uint32(n))
	return b
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestUncompressedSize(t *testing.T) {
	large, small := tarOf(t, 700_000), tarOf(t, 100)
	empty := make([]byte, 1024)
	for _, tc := range []struct {
		name  string
		blob  []byte
		media string
		want  int // 0: an estimate
	}{
		{"gzip", gz(t, large), ocispec.MediaTypeImageLayerGzip, len(large)},
		{"gzip, small", gz(t, small), ocispec.MediaTypeImageLayerGzip, len(small)},
		{"gzip of an empty tar", gz(t, empty), ocispec.MediaTypeImageLayerGzip, len(empty)},
		{"gzip that is called a tar", gz(t, large), ocispec.MediaTypeImageLayer, len(large)},
		{"gzip of two members, the last a small one", join(gz(t, large), gz(t, small)), ocispec.MediaTypeImageLayerGzip, 0},
		{"zstd", zst(t, large), ocispec.MediaTypeImageLayerZstd, len(large)},
		{"zstd with checksum", zst(t, large, zstd.WithEncoderCRC(true)), ocispec.MediaTypeImageLayerZstd, len(large)},
		{"zstd without checksum", zst(t, large, zstd.WithEncoderCRC(false)), ocispec.MediaTypeImageLayerZstd, len(large)},
		{"zstd, one segment", zst(t, small, zstd.WithSingleSegment(true)), ocispec.MediaTypeImageLayerZstd, len(small)},
		{"zstd, 300 bytes: size in two bytes", zst(t, large[:300], zstd.WithSingleSegment(true)), ocispec.MediaTypeImageLayerZstd, 300},
		{"zstd, three frames among skippable ones", join(skippable(5), zst(t, large), skippable(0), zst(t, small), zst(t, large), skippable(900)), ocispec.MediaTypeImageLayerZstd, 2*len(large) + len(small)},
		{"zstd that does not say", zstStream(t, large), ocispec.MediaTypeImageLayerZstd, 0},
		{"zstd, the second frame does not say", join(zst(t, large), zstStream(t, small)), ocispec.MediaTypeImageLayerZstd, 0},
		{"zstd, cut off", zst(t, large)[:1000], ocispec.MediaTypeImageLayerZstd, 0},
		{"zstd and rubbish", join(zst(t, large), []byte("rubbish and more of it")), ocispec.MediaTypeImageLayerZstd, 0},
		{"tar", large, ocispec.MediaTypeImageLayer, len(large)},
		{"tar that is called gzip", large, ocispec.MediaTypeImageLayerGzip, len(large)},
		{"empty tar", empty, ocispec.MediaTypeImageLayer, len(empty)},
		{"something else", []byte("no archive at all"), ocispec.MediaTypeImageLayerGzip, 0},
		{"nothing", nil, ocispec.MediaTypeImageLayerGzip, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, exact := UncompressedSize(blobBytes(tc.blob), int64(len(tc.blob)), tc.media)
			if tc.want == 0 {
				assert.False(t, exact)
				assert.GreaterOrEqual(t, n, placement.EstimateUncompressed(int64(len(tc.blob))))
				return
			}
			assert.True(t, exact)
			assert.EqualValues(t, tc.want, n)
		})
	}
}

// sparse is a gzip blob of any size, of which only the ends are looked at.
type sparse struct {
	size  int64
	isize uint32
	fail  bool
}

func (s sparse) Size() int64  { return s.size }
func (s sparse) Close() error { return nil }
func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	if s.fail {
		return 0, errors.New("no answer")
	}
	clear(p)
	if off == 0 {
		copy(p, []byte{0x1f, 0x8b})
	}
	if off == s.size-4 {
		binary.LittleEndian.PutUint32(p, s.isize)
	}
	return len(p), nil
}

func TestGzipBeyond4GiB(t *testing.T) {
	const gib = 1 << 30
	for _, tc := range []struct {
		size  int64
		isize uint32
		want  int64
	}{
		{2 * gib, 1 * gib, 0},             // smaller than the blob: it has wrapped, once or twice
		{2 * gib, 3 * gib, 0},             // 3 GiB or 7
		{9 * gib, 0, 0},                   // many
		{800 << 20, 3 * gib, 3 * gib},     // 7 GiB would be 9:1
		{100 << 20, 50 << 20, 0},          // 4.05 GiB would be 41:1: rather the last member of several
		{100 << 20, 3 * gib, 0},           // 30:1 is not believed
		{100 << 20, 900 << 20, 900 << 20}, // 9:1 is
	} {
		n, exact := UncompressedSize(sparse{size: tc.size, isize: tc.isize}, tc.size, ocispec.MediaTypeImageLayerGzip)
		assert.Equal(t, tc.want != 0, exact, "%+v", tc)
		if exact {
			assert.Equal(t, tc.want, n, "%+v", tc)
		} else {
			assert.Equal(t, max(int64(tc.isize), placement.EstimateUncompressed(tc.size)), n, "the larger of two doubtful sizes: %+v", tc)
		}
	}
	n, exact := UncompressedSize(sparse{size: 1000, fail: true}, 1000, ocispec.MediaTypeImageLayerGzip)
	assert.False(t, exact)
	assert.Equal(t, placement.EstimateUncompressed(1000), n)
}

func FuzzUncompressedSize(f *testing.F) {
	small := tarOf(f, 50)
	f.Add(gz(f, small))
	f.Add(join(skippable(3), zst(f, small), zst(f, small)))
	f.Add(small)
	f.Fuzz(func(t *testing.T, b []byte) {
		n, exact := UncompressedSize(blobBytes(b), int64(len(b)), ocispec.MediaTypeImageLayer)
		if n < 0 || (!exact && n < placement.EstimateUncompressed(int64(len(b)))) {
			t.Errorf("%d, %v", n, exact)
		}
	})
}
