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
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

func TestHot(t *testing.T) {
	const size = 10*Chunk + 100
	for _, tc := range []struct {
		what    string
		touched []Range
		margin  int64
		want    []Range
	}{
		{"nothing", nil, 0, nil},
		{"rounded", []Range{{5000, 1}}, 0, []Range{{Chunk, Chunk}}},
		{"joined", []Range{{2 * Chunk, Chunk}, {Chunk, Chunk}, {Chunk + 1, 3}}, 0, []Range{{Chunk, 2 * Chunk}}},
		{"across", []Range{{Chunk - 1, 2}}, 0, []Range{{0, 2 * Chunk}}},
		{"the last byte", []Range{{size - 1, 1}}, 0, []Range{{10 * Chunk, 100}}},
		{"to the end", []Range{{9 * Chunk, math.MaxInt64}}, 0, []Range{{9 * Chunk, Chunk + 100}}},
		{"margin", []Range{{3*Chunk + 5, 1}}, Chunk, []Range{{2 * Chunk, 3 * Chunk}}},
		{"margin over both ends", []Range{{1, 1}, {size - 1, 1}}, math.MaxInt64, []Range{{0, size}}},
		{"nonsense", []Range{{-1, 5}, {5, -1}, {0, 0}, {size, 1}, {math.MaxInt64, math.MaxInt64}, {math.MinInt64, math.MinInt64}}, 0, nil},
	} {
		require.Equal(t, tc.want, Hot(size, tc.touched, tc.margin), tc.what)
	}
}

// listed is a set as it stands in an image.
func listed(t testing.TB, set Set) *contents {
	t.Helper()
	c, err := newContents(set)
	require.NoError(t, err)
	for i := range c.blocks {
		c.blocks[i] = uint32(1 + 100*i)
	}
	return c
}

func FuzzHot(f *testing.F) {
	f.Add(int64(100000), int64(5), int64(70000), int64(-1), int64(math.MaxInt64), int64(Chunk))
	f.Add(int64(1), int64(0), int64(1), int64(0), int64(1), int64(0))
	f.Fuzz(func(t *testing.T, size, a, b, c, d, margin int64) {
		if size <= 0 || size > MaxSize || margin < 0 {
			return
		}
		file := File{name(1), size, Hot(size, []Range{{a, b}, {c, d}}, margin)}
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
		want := listed(t, set)
		got, err := parseList(want.appendList(nil))
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

func TestChoose(t *testing.T) {
	const mb = 1 << 20
	large := func(redirect string, size int64, r ...Range) Want { return Want{redirect, size, r} }
	set := Choose([]Want{
		large(name(9), 100*mb, Range{0, mb}),
		large(name(2), 10*mb, Range{0, 9 * mb}), // most of it
		large(name(3), mb/4-1),                  // small
		large(name(4), 2*mb),
		large(name(1), 20*mb, Range{mb, 1}),
		large(name(1), 20*mb, Range{mb, 1}),
		large("/3/../x", 20*mb), large("3/05/5", 20*mb), large("/3", 20*mb), large("/3/06/5", 20*mb), large("/3/05/5\x00", 20*mb),
		large("/3/05/05", 20*mb), large("/3/00/0", 20*mb), large("/-3/05/5", 20*mb), large("/3/05/5/", 20*mb),
		large(name(5), -5), large(name(6), math.MaxInt64),
	}, Rules{})
	var names []string
	for _, f := range set.Files {
		names = append(names, f.Redirect)
		require.Less(t, f.Bytes()+f.Saved(), f.Size)
	}
	require.Equal(t, []string{name(1), name(4), name(9)}, names)
	require.Equal(t, []Range{{mb - 16<<10, Chunk + 32<<10}}, set.Files[0].Hot)
	require.EqualValues(t, 16<<10, set.Margin)
	require.NoError(t, set.check())
	few := Choose([]Want{large(name(1), 2*mb), large(name(2), 4*mb), large(name(3), 3*mb)}, Rules{MaxFiles: 2})
	require.Len(t, few.Files, 2)
	require.Equal(t, name(2), few.Files[0].Redirect)
	require.Equal(t, name(3), few.Files[1].Redirect)
	require.Empty(t, Choose(nil, Rules{}).Files)
}

// The margin is the largest that costs no more than there is to spare.
func TestMargin(t *testing.T) {
	const mb = 1 << 20
	wants := []Want{{name(1), 20 * mb, []Range{{mb, Chunk}, {5 * mb, Chunk}}}, {name(2), mb, []Range{{0, mb / 2}}}}
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
	tight := []Want{{name(1), mb, []Range{{0, mb - 100<<10}}}}
	require.Equal(t, int64(32<<10), Choose(tight, Rules{Spare: 90 << 10, MinShare: 0.05}).Margin)
	require.Equal(t, int64(128<<10), Choose(tight, Rules{Spare: 101 << 10, MinShare: 0.05}).Margin)
}

// images are made without mounts: any filesystem will do.
func plain(t *testing.T) (nvm string, packs *packs, path string) {
	dir := t.TempDir()
	nvm, packs = filepath.Join(dir, "nvm"), newPacks(filepath.Join(dir, "hdd"))
	require.NoError(t, os.Mkdir(nvm, 0o755))
	require.NoError(t, os.Mkdir(packs.dir, 0o755))
	return nvm, packs, filepath.Join(dir, "7.erofs")
}

func TestCold(t *testing.T) {
	f := File{name(1), 100, []Range{{10, 10}, {40, 20}}}
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
	nvm, packs, path := plain(t)
	const size = 5*Chunk + 11
	packs.add(t, name(1), random(size))
	set := Set{Files: []File{{name(1), size, Hot(size, []Range{{0, 1}}, 0)}}, Margin: 8 << 10}
	_, err := Write(t.Context(), path, nvm, packs, set, noPace)
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
	c, err := newContents(set)
	require.NoError(t, err)
	c.blocks[0] = 1
	list := c.appendList(nil)
	require.True(t, bytes.Equal(list, good[len(good)-footerSize-len(list):len(good)-footerSize]))
	meta := 4096
	for off := erofs.SuperOffset + 4; off < len(good); off += 7 {
		if off >= meta && off < len(good)-footerSize-len(list) {
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
	require.ErrorIs(t, Verify(t.Context(), path, packs.PackPath, noPace), errdefs.ErrDataLoss)

	bad = bytes.Clone(good)
	copy(bad[erofs.SuperOffset+64:], "nhybrid-parts-2")
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
	f.Add(listed(f, Set{Files: []File{{name(1), 5*Chunk + 11, Hot(5*Chunk+11, []Range{{0, 1}}, 0)}, {"/4/09/9", Chunk, nil}}}).appendList(nil))
	f.Add([]byte{})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseList(b)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			return
		}
		require.NoError(t, c.check())
		again, err := parseList(c.appendList(nil))
		require.NoError(t, err)
		require.Equal(t, c, again)
	})
}

// A work that ends early leaves what was there, and nothing else.
func TestWriteThatFails(t *testing.T) {
	nvm, packs, path := plain(t)
	const size = 500 * Chunk
	packs.add(t, name(1), random(size))
	all := Set{Files: []File{{name(1), size, []Range{{0, size}}}}}
	_, err := Write(t.Context(), path, nvm, packs, Set{Files: []File{{name(1), size, nil}}}, noPace)
	require.NoError(t, err)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	enough, pieces := errors.New("enough"), 0
	_, err = Write(t.Context(), path, nvm, packs, all, func(n int) error {
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
	_, err = Write(ctx, path, nvm, packs, all, noPace)
	require.ErrorIs(t, err, context.Canceled)
	for i, files := range [][]File{
		nil,
		{{name(1), size, []Range{{1, Chunk}}}},
		{{name(1), size, []Range{{0, Chunk}, {Chunk, Chunk}}}},
		{{name(1), size, []Range{{0, size + Chunk}}}},
		{{name(1), 0, nil}},
		{{name(2), size, nil}, {name(1), size, nil}},
		{{name(1), size, nil}, {name(1), size, nil}},
		{{"/3/./01/1", size, nil}},
	} {
		_, err = Write(t.Context(), path, nvm, packs, Set{Files: files}, noPace)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, fmt.Sprint(i))
	}
	_, err = Write(t.Context(), path, nvm, packs, Set{Files: []File{{name(2), size, nil}}}, noPace)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = Write(t.Context(), path, nvm, packs, Set{Files: []File{{name(1), size + 1, nil}}}, noPace)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
	names, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, names, 3, "NVM, packs and the image")
}

// The same list and data give the same image.
func TestSameBytes(t *testing.T) {
	nvm, packs, path := plain(t)
	const size = 9*Chunk + 5
	var images [2][]byte
	packs.add(t, name(1), random(size))
	for i := range images {
		_, err := Write(t.Context(), path, nvm, packs, Set{Files: []File{{name(1), size, Hot(size, []Range{{Chunk, Chunk}}, 0)}}}, noPace)
		require.NoError(t, err)
		images[i], err = os.ReadFile(path)
		require.NoError(t, err)
	}
	require.True(t, bytes.Equal(images[0], images[1]))
}
