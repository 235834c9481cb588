// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

func TestExpected(t *testing.T) {
	some := []profile.Range{{Offset: 65536, Length: 65536}}
	for _, c := range []struct {
		f    profile.File
		want []profile.Range
	}{
		{profile.File{Size: 10, Weight: 1, Touched: 10}, []profile.Range{{Offset: 0, Length: 10}}},
		{profile.File{Size: 10, Weight: 0.2, Touched: 10}, nil},
		{profile.File{Size: 1 << 20, Weight: 1, Touched: 65536, Ranges: some}, some},
		{profile.File{Size: 1 << 20, Weight: 1, Touched: -1}, nil}, // to be found out by the start
		{profile.File{Size: 1 << 10, Weight: 1, Touched: -1}, []profile.Range{{Offset: 0, Length: 1 << 10}}},
	} {
		require.Equal(t, c.want, expected(&c.f), "%+v", c.f)
	}
}

// What a start is expected to use is read before it asks for it, and nothing else.
func TestReadAhead(t *testing.T) {
	const size = 12 << 20 // more than any device takes by one request
	image := imageOf("a", "1")
	s := &still{images: []Image{image}, layers: []plan.Layer{{ID: "1", Tier: placement.HDD, NVM: 1, Used: time.Now()}}}
	m := newManager(t, s, &shelf{})
	at := map[string]string{}
	for i, name := range []string{"part", "unused", "whole", "link"} {
		at[name] = s.put(t, "/"+name, pack.Ref{Layer: 1, Number: uint32(i + 1)}, bytes.Repeat([]byte("x"), size))
	}
	at["secret"] = filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.Rename(at["link"], at["secret"]))
	require.NoError(t, os.Symlink(at["secret"], at["link"]))
	for _, name := range []string{"part", "unused", "whole", "secret"} {
		f, err := os.Open(at[name])
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		require.NoError(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		require.NoError(t, f.Close())
	}
	if cachedOf(t, at["whole"]) > 0 {
		t.Skip("the temporary directory is on a filesystem that is all cache")
	}
	use := profile.Start{Complete: true, At: time.Now()}
	all := profile.Use{Kind: profile.Read, Touched: size, Ranges: []profile.Range{{Offset: 0, Length: size}}}
	part := all
	part.Touched, part.Ranges = 65536, []profile.Range{{Offset: 1 << 20, Length: 65536}}
	for path, u := range map[profile.Path]profile.Use{"link": all, "part": part, "whole": all, "gone": all} {
		u.Entry = profile.Entry{Path: path, Size: size}
		use.Files = append(use.Files, u)
	}
	_, err := m.book.Record(image.Image, use, nil)
	require.NoError(t, err)
	for range 2 {
		m.mu.Lock()
		m.readAhead(image)
		m.mu.Unlock()
		require.Eventually(t, func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return len(m.ahead) == 0
		}, 10*time.Second, time.Millisecond)
	}
	require.EqualValues(t, size, cachedOf(t, at["whole"]))
	require.EqualValues(t, 65536, cachedOf(t, at["part"]))
	require.Zero(t, cachedOf(t, at["unused"]))
	require.Zero(t, cachedOf(t, at["secret"]), "it is not in the store")
	require.EqualValues(t, 1, s.lists.Load(), "the second start finds the names")
}

func cachedOf(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	var st unix.Cachestat_t
	require.NoError(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))
	return int64(st.Cache) * int64(os.Getpagesize())
}
