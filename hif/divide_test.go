// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// withParts is a store with packs, each of one file from its second block on.
type withParts struct {
	*still
	dir     string
	changed chan string
}

func (s *withParts) PartsPath(view string) string { return filepath.Join(s.dir, view) }
func (s *withParts) PartsChanged(_ context.Context, view string) error {
	s.changed <- view
	return nil
}
func (s *withParts) PackPath(uint64) string { return filepath.Join(s.dir, "pack") }
func (s *withParts) PackFile(pack.Ref) (block uint32, size int64, err error) {
	return 1, s.files[0].Size, nil
}

// Of a large file parts come from its pack, and then the whole file leaves NVM.
func TestLargeFileIsDivided(t *testing.T) {
	const mb = 1 << 20
	image := imageOf("a", "1")
	s := &withParts{dir: t.TempDir(), changed: make(chan string, 1), still: &still{root: t.TempDir(), images: []Image{image},
		layers: []plan.Layer{{ID: "1", Tier: placement.HDD, NVM: 8 * mb, Used: time.Now()}}}}
	data := bytes.Repeat([]byte("0123456789abcdef"), 8*mb/16)
	large := s.put(t, "/large", pack.Ref{Layer: 1, Number: 300}, data)
	require.NoError(t, os.WriteFile(s.PackPath(1), append(make([]byte, pack.BlockSize), data...), 0o600))
	m, err := New(t.Context(), Config{Migrate: true, PartsFrom: mb}, s, s, Books{Profiles: &shelf{}, Predictions: &shelf{}, Origins: &shelf{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	use := profile.Use{Entry: profile.Entry{Path: "large", Size: 8 * mb}, Kind: profile.Exec, Touched: mb, Ranges: []profile.Range{{Offset: mb, Length: mb}}}
	_, err = m.book.Record(image.Image, profile.Start{At: time.Now(), Complete: true, Files: []profile.Use{use}}, nil)
	require.NoError(t, err)

	require.NoError(t, m.apply(t.Context(), s.images))
	require.FileExists(t, large, "its parts are not there yet")
	select {
	case view := <-s.changed:
		require.Equal(t, image.View, view)
	case <-time.After(10 * time.Second):
		t.Fatal("no parts are made")
	}
	set, err := parts.Read(s.PartsPath(image.View))
	require.NoError(t, err)
	require.Len(t, set.Files, 1)
	require.Equal(t, "/1/2c/300", set.Files[0].Redirect)
	require.Empty(t, set.Files[0].Cold([]parts.Range{{Offset: mb, Length: mb}}))
	require.NoError(t, parts.Verify(t.Context(), s.PartsPath(image.View), s.PackPath, func(int) error { return nil }))

	require.NoError(t, m.apply(t.Context(), s.images))
	require.NoError(t, m.engine.Wait(t.Context()))
	require.NoFileExists(t, large)

	// What a start with parts touches of them is not learned again.
	files := []trace.File{{Ref: pack.Ref{Layer: 1, Number: 300}, Size: 8 * mb, Parts: true, Ranges: []trace.Range{{Offset: mb, Length: mb}, {Offset: 6 * mb, Length: 4096}}}}
	m.leaveHot(&openStart{Start: Start{View: image.View}}, files)
	require.Equal(t, []trace.Range{{Offset: 6 * mb, Length: 4096}}, files[0].Ranges)
}

// Before the first start of an image its large files on NVM leave the page
// cache, once.
func TestCool(t *testing.T) {
	image := imageOf("a", "1")
	s := &still{images: []Image{image}}
	m := newManager(t, s, &shelf{})
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(s.root, &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary directory is on a filesystem that is all cache")
	}
	m.config.PartsFrom = 1 << 20
	m.tracer = &trace.Tracer{}
	t.Cleanup(func() { m.tracer = nil })
	large := s.put(t, "/large", pack.Ref{Layer: 1, Number: 1}, make([]byte, 2<<20))
	small := s.put(t, "/small", pack.Ref{Layer: 1, Number: 2}, make([]byte, 1<<18))
	for _, path := range []string{large, small} {
		f, err := os.Open(path)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		require.NoError(t, f.Close())
	}
	w, err := m.want(t.Context(), image)
	require.NoError(t, err)
	images := []wanted{w}
	m.cool(images, []plan.Layer{{ID: "1", Fixed: "it is not on its device yet"}})
	require.Empty(t, m.cooled)
	require.Eventually(t, func() bool { // what is under write-back stays
		m.cooled = nil
		m.cool(images, nil)
		return cachedOf(t, large) == 0
	}, 10*time.Second, time.Millisecond)
	require.NotZero(t, cachedOf(t, small))
	_, err = os.ReadFile(large)
	require.NoError(t, err)
	m.cool(images, nil)
	require.NotZero(t, cachedOf(t, large), "a start may have read it meanwhile")
}
