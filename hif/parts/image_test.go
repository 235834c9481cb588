// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

func TestHot(t *testing.T) {
	const size = 10*Chunk + 100
	tail := Range{10 * Chunk, 100}
	for _, tc := range []struct {
		what    string
		touched []Range
		margin  int64
		want    []Range
	}{
		{"nothing: the end", nil, 0, []Range{tail}},
		{"rounded", []Range{{5000, 1}}, 0, []Range{{Chunk, Chunk}, tail}},
		{"joined", []Range{{2 * Chunk, Chunk}, {Chunk, Chunk}, {Chunk + 1, 3}}, 0, []Range{{Chunk, 2 * Chunk}, tail}},
		{"across", []Range{{Chunk - 1, 2}}, 0, []Range{{0, 2 * Chunk}, tail}},
		{"to the end", []Range{{9 * Chunk, math.MaxInt64}}, 0, []Range{{9 * Chunk, Chunk + 100}}},
		{"margin", []Range{{3*Chunk + 5, 1}}, Chunk, []Range{{2 * Chunk, 3 * Chunk}, tail}},
		{"margin over both ends", []Range{{1, 1}, {size - 1, 1}}, math.MaxInt64, []Range{{0, size}}},
		{"nonsense", []Range{{-1, 5}, {5, -1}, {0, 0}, {size, 1}, {math.MaxInt64, math.MaxInt64}, {math.MinInt64, math.MinInt64}}, 0, []Range{tail}},
	} {
		require.Equal(t, tc.want, Hot(size, tc.touched, tc.margin), tc.what)
	}
	require.Empty(t, Hot(10*Chunk, nil, 0))
	require.Empty(t, Hot(4096, nil, 0))
	require.Equal(t, []Range{{4096, 1}}, Hot(4097, nil, 0))
}

func FuzzHot(f *testing.F) {
	f.Add(int64(100000), int64(5), int64(70000), int64(-1), int64(math.MaxInt64), int64(Chunk))
	f.Add(int64(1), int64(0), int64(1), int64(0), int64(1), int64(0))
	f.Fuzz(func(t *testing.T, size, a, b, c, d, margin int64) {
		if size <= 0 || size > MaxSize || margin < 0 {
			return
		}
		file := File{"/3/f", size, Hot(size, []Range{{a, b}, {c, d}}, margin)}
		set := Set{Files: []File{file}, Margin: min(margin, MaxSize)}
		require.NoError(t, set.check())
		if a >= 0 && a < size && b > 0 { // what is touched is hot
			last := a
			if b <= size-a {
				last = a + b - 1
			}
			for _, at := range []int64{a, last} {
				found := false
				for _, r := range file.Hot {
					found = found || at >= r.Offset && at < r.end()
				}
				require.True(t, found, "%d in %v", at, file.Hot)
			}
		}
		got, err := parseList(appendList(nil, set))
		require.NoError(t, err)
		require.Equal(t, set, got)
	})
}

func TestChoose(t *testing.T) {
	const mb = 1 << 20
	large := func(name string, size int64, r ...Range) Want { return Want{name, size, r} }
	set := Choose([]Want{
		large("/3/z", 100*mb, Range{0, mb}),
		large("/3/most", 10*mb, Range{0, 9 * mb}),
		large("/3/small", mb/4-1),
		large("/3/untouched", 2*mb),
		large("/3/a", 20*mb, Range{mb, 1}),
		large("/3/a", 20*mb, Range{mb, 1}),
		large("/3/../x", 20*mb), large("3/x", 20*mb), large("/3", 20*mb), large("/3/"+strings.Repeat("n", 256), 20*mb), large("/3/x\x00", 20*mb),
		large("/3/"+strings.Repeat("n/", 3000)+"n", 20*mb),
		large("/3/impossible", -5), large("/3/huge", math.MaxInt64),
	}, Rules{})
	var names []string
	for _, f := range set.Files {
		names = append(names, f.Redirect)
		require.Less(t, f.Bytes()+f.Saved(), f.Size)
	}
	require.Equal(t, []string{"/3/a", "/3/untouched", "/3/z"}, names)
	require.Equal(t, []Range{{mb - 16<<10, Chunk + 32<<10}}, set.Files[0].Hot)
	require.EqualValues(t, 16<<10, set.Margin)
	require.NoError(t, set.check())
	few := Choose([]Want{large("/3/a", 2*mb), large("/3/b", 4*mb), large("/3/c", 3*mb)}, Rules{MaxFiles: 2})
	require.Len(t, few.Files, 2)
	require.Equal(t, "/3/b", few.Files[0].Redirect)
	require.Equal(t, "/3/c", few.Files[1].Redirect)
	require.Empty(t, Choose(nil, Rules{}).Files)
}

// The margin is the largest that costs no more than there is to spare.
func TestMargin(t *testing.T) {
	const mb = 1 << 20
	wants := []Want{{"/3/a", 20 * mb, []Range{{mb, Chunk}, {5 * mb, Chunk}}}, {"/3/b", mb, []Range{{0, mb / 2}}}}
	cost := func(margin int64) int64 { return 5 * margin } // two on both sides, one at its end
	for _, tc := range []struct{ spare, margin int64 }{
		{0, 16 << 10}, {cost(32<<10) - 1, 16 << 10}, {cost(32<<10) + 100, 32 << 10}, {cost(64<<10) + 100, 64 << 10}, {100 * mb, 128 << 10},
	} {
		set := Choose(wants, Rules{Spare: tc.spare})
		require.Equal(t, tc.margin, set.Margin, tc.spare)
		require.Len(t, set.Files, 2)
		require.Equal(t, []Range{{mb - tc.margin, Chunk + 2*tc.margin}, {5*mb - tc.margin, Chunk + 2*tc.margin}}, set.Files[0].Hot)
	}
	// A file that is no longer worth dividing with a margin costs all that it saved.
	tight := []Want{{"/3/a", mb, []Range{{0, mb - 100<<10}}}}
	require.Equal(t, int64(32<<10), Choose(tight, Rules{Spare: 90 << 10, MinShare: 0.05}).Margin)
	require.Equal(t, int64(128<<10), Choose(tight, Rules{Spare: 101 << 10, MinShare: 0.05}).Margin)
}

// images are made without mounts: any filesystem will do.
func plain(t *testing.T) (roots Roots, path string) {
	dir := t.TempDir()
	roots = Roots{filepath.Join(dir, "nvm"), filepath.Join(dir, "hdd")}
	require.NoError(t, os.MkdirAll(roots.NVM, 0o755))
	require.NoError(t, os.MkdirAll(roots.HDD+"/3/dir", 0o755))
	return roots, filepath.Join(dir, "7.erofs")
}

func TestCold(t *testing.T) {
	f := File{"/3/f", 100, []Range{{10, 10}, {40, 20}}}
	for _, tc := range []struct{ touched, cold []Range }{
		{nil, nil},
		{[]Range{{10, 10}, {45, 5}}, nil},
		{[]Range{{0, 5}, {30, 5}, {60, 40}}, []Range{{0, 5}, {30, 5}, {60, 40}}},
		{[]Range{{0, 100}}, []Range{{0, 10}, {20, 20}, {60, 40}}},
		{[]Range{{5, 10}, {18, 4}, {50, 11}}, []Range{{5, 5}, {20, 2}, {60, 1}}},
	} {
		require.Equal(t, tc.cold, f.Cold(tc.touched))
	}
}

func TestReadRefuses(t *testing.T) {
	roots, path := plain(t)
	const size = 5*Chunk + 11
	require.NoError(t, os.WriteFile(roots.HDD+"/3/f", random(size), 0o600))
	set := Set{Files: []File{{"/3/f", size, Hot(size, []Range{{0, 1}}, 0)}}, Margin: 8 << 10}
	_, err := Write(t.Context(), path, roots, set, noPace)
	require.NoError(t, err)
	good, err := os.ReadFile(path)
	require.NoError(t, err)
	try := func(b []byte) error {
		t.Helper()
		require.NoError(t, os.WriteFile(path, b, 0o600))
		_, err := Read(path)
		return err
	}
	for _, n := range []int{0, 1, 1024, 4095, 4096, len(good) - footerSize, len(good) - footerSize - 1, len(good) - 1} {
		require.ErrorIs(t, try(good[:n]), errdefs.ErrDataLoss, "cut off at %d", n)
	}
	require.ErrorIs(t, try(append(bytes.Clone(good), 0)), errdefs.ErrDataLoss)
	meta := 4096
	for off := erofs.SuperOffset + 4; off < len(good); off += 7 {
		if off >= meta && off < len(good)-footerSize-len(appendList(nil, set)) {
			continue // hot data
		}
		bad := bytes.Clone(good)
		bad[off] ^= 0x10
		require.ErrorIs(t, try(bad), errdefs.ErrDataLoss, "byte %d", off)
	}
	// Damage of the data is found by Verify alone.
	bad := bytes.Clone(good)
	bad[meta+100] ^= 1
	require.NoError(t, try(bad))
	require.ErrorIs(t, Verify(t.Context(), path, roots.HDD, noPace), errdefs.ErrDataLoss)

	bad = bytes.Clone(good)
	copy(bad[erofs.SuperOffset+64:], "nhybrid-parts-3")
	erofs.SetChecksum(bad)
	require.ErrorIs(t, try(bad), errdefs.ErrFailedPrecondition)
	copy(bad[erofs.SuperOffset+64:], "nhybrid-tree-1\x00")
	erofs.SetChecksum(bad)
	require.ErrorIs(t, try(bad), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, try(make([]byte, 10000)), errdefs.ErrInvalidArgument)
	require.NoError(t, try(good))
	got, err := Read(path)
	require.NoError(t, err)
	require.Equal(t, set, got)
}

func FuzzParseList(f *testing.F) {
	f.Add(appendList(nil, Set{Files: []File{{"/3/f", 5*Chunk + 11, Hot(5*Chunk+11, []Range{{0, 1}}, 0)}, {"/4/g", Chunk, nil}}}))
	f.Add([]byte{})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := parseList(b)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			return
		}
		require.NoError(t, set.check())
		again, err := parseList(appendList(nil, set))
		require.NoError(t, err)
		require.Equal(t, set, again)
	})
}

// A work that ends early leaves what was there, and nothing else.
func TestWriteThatFails(t *testing.T) {
	roots, path := plain(t)
	const size = 500 * Chunk
	require.NoError(t, os.WriteFile(roots.HDD+"/3/f", random(size), 0o600))
	all := Set{Files: []File{{"/3/f", size, []Range{{0, size}}}}}
	_, err := Write(t.Context(), path, roots, Set{Files: []File{{"/3/f", size, nil}}}, noPace)
	require.NoError(t, err)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	enough, pieces := errors.New("enough"), 0
	_, err = Write(t.Context(), path, roots, all, func(n int) error {
		require.Positive(t, n)
		require.LessOrEqual(t, n, 512<<10)
		if pieces++; pieces == 3 {
			return enough
		}
		return nil
	})
	require.ErrorIs(t, err, enough)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Write(ctx, path, roots, all, noPace)
	require.ErrorIs(t, err, context.Canceled)
	for i, files := range [][]File{
		nil,
		{{"/3/f", size, []Range{{1, Chunk}}}},
		{{"/3/f", size, []Range{{0, Chunk}, {Chunk, Chunk}}}},
		{{"/3/f", size + 1, nil}},
		{{"/3/f", size, []Range{{0, size + Chunk}}}},
		{{"/3/f", 0, nil}},
		{{"/3/g", size, nil}, {"/3/f", size, nil}},
		{{"/3/f", size, nil}, {"/3/f", size, nil}},
		{{"/3/f", size, nil}, {"/3/f/g", size, nil}},
		{{"/3/./f", size, nil}},
	} {
		_, err = Write(t.Context(), path, roots, Set{Files: files}, noPace)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, fmt.Sprint(i))
	}
	_, err = Write(t.Context(), path, roots, Set{Files: []File{{"/3/none", size, nil}}}, noPace)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
	names, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, names, 3, "the roots and the image")
}

// The same list and data give the same image.
func TestSameBytes(t *testing.T) {
	roots, path := plain(t)
	const size = 9*Chunk + 5
	var images [2][]byte
	require.NoError(t, os.WriteFile(roots.HDD+"/3/f", random(size), 0o600))
	for i := range images {
		_, err := Write(t.Context(), path, roots, Set{Files: []File{{"/3/f", size, Hot(size, []Range{{Chunk, Chunk}}, 0)}}}, noPace)
		require.NoError(t, err)
		images[i], err = os.ReadFile(path)
		require.NoError(t, err)
	}
	require.True(t, bytes.Equal(images[0], images[1]))
}
