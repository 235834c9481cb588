// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func vol(name string) Ref { return Ref{Volume, "default", name} }

// All that a volume goes through, on each filesystem.
func TestVolume(t *testing.T) {
	everywhere(t, func(t *testing.T, dir string) {
		ctx := t.Context()
		s := open(t, dir, Options{})
		r, err := s.Create(ctx, "default", "orders", CreateOptions{Size: 8 * mib})
		require.NoError(t, err)
		require.GreaterOrEqual(t, blocks(t, s.data(r.Ref)), int64(8*mib))
		put(t, s.data(r.Ref), 41)
		_, first := get(t, s.data(r.Ref))

		_, err = s.Create(ctx, "default", "orders", CreateOptions{Size: 8 * mib})
		require.True(t, errdefs.IsAlreadyExists(err), "%v", err)

		snap, err := s.Snapshot(ctx, r.Ref, "monday")
		require.NoError(t, err)
		require.Less(t, snap.Used, int64(mib))
		require.Less(t, blocks(t, s.data(snap.Ref)), int64(mib))
		// A copy of its own: the region has no blocks to share, so that no store into it needs new ones.
		put(t, s.data(r.Ref), 42)
		n, _ := get(t, s.data(snap.Ref))
		require.EqualValues(t, 41, n)

		c, err := s.Clone(ctx, snap.Ref, "copy", CreateOptions{Size: 16 * mib})
		require.NoError(t, err)
		require.EqualValues(t, 16*mib, c.Size)
		require.GreaterOrEqual(t, blocks(t, s.data(c.Ref)), int64(16*mib))
		n, info := get(t, s.data(c.Ref))
		require.EqualValues(t, 41, n)
		require.Equal(t, first.UUID, info.Parent)
		require.EqualValues(t, 16*mib, info.Size)

		var b bytes.Buffer
		stats, err := s.Export(ctx, r.Ref, &b)
		require.NoError(t, err)
		require.EqualValues(t, b.Len(), stats.Stream)
		require.Less(t, b.Len(), mib)
		back, err := s.Import(ctx, "other", "orders", bytes.NewReader(b.Bytes()))
		require.NoError(t, err)
		n, _ = get(t, s.data(back.Ref))
		require.EqualValues(t, 42, n)

		grown, err := s.Resize(ctx, r.Ref, 12*mib)
		require.NoError(t, err)
		require.EqualValues(t, 12*mib, grown.Size)
		require.GreaterOrEqual(t, blocks(t, s.data(r.Ref)), int64(12*mib))
		n, info = get(t, s.data(r.Ref))
		require.EqualValues(t, 42, n)
		require.EqualValues(t, 12*mib, info.Size)
		_, err = s.Resize(ctx, r.Ref, 8*mib)
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)

		rep, err := s.Check(ctx, r.Ref, false)
		require.NoError(t, err)
		require.Empty(t, rep.Problems)
		require.True(t, rep.Formatted)
		require.EqualValues(t, 1, rep.HeapBlocks)

		require.Len(t, s.List(""), 4)
		require.Len(t, s.List("default"), 3)
		for _, r := range s.List("") {
			require.NoError(t, s.Remove(ctx, r.Ref))
		}
		books, err := s.Books()
		require.NoError(t, err)
		require.Zero(t, books.Promised+books.Making)
		empty(t, s)
	})
}

// empty checks that nothing is left of any region.
func empty(t *testing.T, s *Store) {
	t.Helper()
	for _, d := range []string{"k", "tmp"} {
		left, err := os.ReadDir(filepath.Join(s.root, d))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// A copy of what does not exist, under its own name, waits for nobody.
func TestCloneOfNothing(t *testing.T) {
	s := newStore(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	_, err := s.Clone(ctx, vol("a"), "a", CreateOptions{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// A region of bytes that scmlib did not make travels as it is.
func TestRaw(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{})
	r, err := s.Create(ctx, "default", "raw", CreateOptions{Size: mib})
	require.NoError(t, err)
	want := bytes.Repeat([]byte("raw data"), 1000)
	f, err := os.OpenFile(s.data(r.Ref), os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(want, 300_000)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	c, err := s.Clone(ctx, r.Ref, "raw2", CreateOptions{Size: 2 * mib})
	require.NoError(t, err)
	got, err := os.ReadFile(s.data(c.Ref))
	require.NoError(t, err)
	whole := make([]byte, 2*mib)
	copy(whole[300_000:], want)
	require.True(t, bytes.Equal(whole, got))
	rep, err := s.Check(ctx, c.Ref, false)
	require.NoError(t, err)
	require.False(t, rep.Formatted)
	require.Empty(t, rep.Problems)
}

func TestCheckHealsOneHeaderAndRefusesTwo(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{})
	r, err := s.Create(ctx, "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	path := s.data(r.Ref)
	put(t, path, 5)
	spoil := func(off int64) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte{0xff}, off)
		require.NoError(t, errors.Join(err, f.Close()))
	}
	spoil(100)
	rep, err := s.Check(ctx, r.Ref, false)
	require.NoError(t, err)
	require.True(t, rep.HeaderBad)
	require.False(t, rep.Repaired)
	_, err = s.Check(ctx, r.Ref, true)
	require.NoError(t, err)
	rep, err = s.Check(ctx, r.Ref, false)
	require.NoError(t, err)
	require.False(t, rep.HeaderBad)
	spoil(100)
	spoil(4096 + 100)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	rep, err = s.Check(ctx, r.Ref, true)
	require.NoError(t, err)
	require.Len(t, rep.Problems, 1)
	require.Contains(t, rep.Problems[0], "both copies of the header")
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
}

func TestQuotaLimitRoom(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	s := open(t, dir, Options{Limit: 40 * mib, Headroom: 8 * mib, Quota: Quota{Bytes: 16 * mib, Regions: 2}, Quotas: map[string]Quota{"rich": {}}})
	create := func(ns, name string, size int64) error {
		_, err := s.Create(ctx, ns, name, CreateOptions{Size: size})
		if err != nil {
			require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
		}
		return err
	}
	require.ErrorContains(t, create("a", "x", 17*mib), `namespace "a" has 0 in regions and asks for 17m more, its quota is 16m`)
	require.NoError(t, create("a", "x", 8*mib))
	require.NoError(t, create("a", "y", 4*mib))
	require.ErrorContains(t, create("a", "z", mib), "has 2 regions, its quota is 2")
	require.ErrorContains(t, create("rich", "x", 30*mib), "all regions together may have 40m")
	require.NoError(t, create("rich", "x", 28*mib))
	require.NoError(t, s.Remove(ctx, Ref{Volume, "rich", "x"}))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "layers"), make([]byte, 30*mib), 0o600))
	require.ErrorContains(t, create("rich", "x", 20*mib), "NVM has room for")
	_, err := s.Resize(ctx, Ref{Volume, "a", "x"}, 13*mib)
	require.ErrorContains(t, err, "its quota is 16m")
	// What a failure leaves is nothing.
	b, err := s.Books()
	require.NoError(t, err)
	require.EqualValues(t, 12*mib, b.Promised)
	require.Zero(t, b.Making)
}

// What a container has counts for its tenant, who is another namespace than the one that all containers of Kubernetes are in.
func TestTenants(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	o := Options{Quotas: map[string]Quota{"shop.k8s.io": {Bytes: 8 * mib}, "k8s.io": {Bytes: mib}}}
	s, err := Open(ctx, filepath.Join(dir, "r"), o)
	require.NoError(t, err)
	p := sleeper(t)
	attach := func(a api.Attach) error {
		t.Helper()
		a.Namespace, a.Pid = "k8s.io", p.Process.Pid
		foreseen := s.Foresee(a)
		f, _, err := s.Attach(ctx, a, nil)
		if foreseen != nil {
			require.ErrorContains(t, err, foreseen.Error())
		}
		if err == nil {
			require.NoError(t, f.Close())
		}
		return err
	}
	require.NoError(t, attach(api.Attach{Container: "c1", Size: 6 * mib, Tenant: "shop.k8s.io"}))
	require.ErrorContains(t, attach(api.Attach{Container: "c2", Size: 3 * mib, Tenant: "shop.k8s.io"}), `namespace "shop.k8s.io" has 6m in regions`)
	require.NoError(t, attach(api.Attach{Container: "c2", Size: 3 * mib, Tenant: "bank.k8s.io"}))
	require.ErrorContains(t, attach(api.Attach{Container: "c3", Size: 2 * mib}), `namespace "k8s.io" has 0 in regions`)
	require.Error(t, attach(api.Attach{Container: "c3", Size: mib, Tenant: "../x"}))
	require.Error(t, attach(api.Attach{Container: "c3", Size: 5, Tenant: "bank.k8s.io"}))

	// Volumes are the tenant's own.
	_, err = s.Create(ctx, "bank.k8s.io", "gold", CreateOptions{Size: mib})
	require.NoError(t, err)
	require.ErrorContains(t, attach(api.Attach{Container: "c4", Volume: "gold", Tenant: "shop.k8s.io"}), "scm create -n shop.k8s.io gold")
	require.ErrorContains(t, attach(api.Attach{Container: "c4", Volume: "gold"}), "scm create -n k8s.io gold")
	require.NoError(t, attach(api.Attach{Container: "c4", Volume: "gold", Tenant: "bank.k8s.io"}))

	end(p)

	// It is known after a restart, and to what is made of the region.
	_, err = s.Snapshot(ctx, Ref{Container, "k8s.io", "c1"}, "then")
	require.NoError(t, err)
	require.NoError(t, s.SetKeep(ctx, Ref{Container, "k8s.io", "c1"}, true))
	require.NoError(t, s.Close())
	s = open(t, dir, o)
	usage := func(ns string) Usage {
		t.Helper()
		b, err := s.Books()
		require.NoError(t, err)
		return b.Namespaces[ns]
	}
	require.Equal(t, 2, usage("shop.k8s.io").Regions)
	require.GreaterOrEqual(t, usage("shop.k8s.io").Bytes, int64(6*mib))
	require.Zero(t, usage("k8s.io"))
	require.NoError(t, s.Release(ctx, "k8s.io", "c1"))
	r, err := s.Inspect(Ref{Volume, "shop.k8s.io", "c1"})
	require.NoError(t, err)
	require.Empty(t, r.Tenant)
	require.Equal(t, 2, usage("shop.k8s.io").Regions)
}

// Many ask at once for what only some can get: the books are never overdrawn.
func TestConcurrentAdmission(t *testing.T) {
	s := newStore(t, Options{Limit: 10 * mib})
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for i := range 30 {
		wg.Go(func() {
			_, err := s.Create(context.Background(), "default", fmt.Sprintf("v%d", i), CreateOptions{Size: mib})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				made++
			} else if !errdefs.IsResourceExhausted(err) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 10, made)
}

func TestPoolGivesWayAndServes(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{Pool: map[int64]int{4 * mib: 2}, Limit: 16 * mib})
	filled := func() bool { return s.Pooled(4*mib) == 2 }
	require.Eventually(t, filled, waitFor, tick)
	entries, err := os.ReadDir(filepath.Join(s.root, "pool"))
	require.NoError(t, err)
	var inodes []uint64
	for _, e := range entries {
		inodes = append(inodes, inode(t, filepath.Join(s.root, "pool", e.Name(), "data")))
	}
	r, err := s.Create(ctx, "default", "a", CreateOptions{Size: 4 * mib})
	require.NoError(t, err)
	require.True(t, slices.Contains(inodes, inode(t, s.data(r.Ref))), "it comes from the pool")
	require.Eventually(t, filled, waitFor, tick)
	_, err = s.Create(ctx, "default", "b", CreateOptions{Size: 12 * mib})
	require.NoError(t, err)
	require.Zero(t, s.Pooled(4*mib))
	require.NoError(t, s.Remove(ctx, vol("b")))
	require.Eventually(t, filled, waitFor, tick)
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Ino
}

func TestNames(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{})
	for _, name := range []string{"", ".", "..", "../a", "a/b", "a+b", "a b", "-a", "a\x00", "256m", "1G", "4096", "image", "container/..", "snapshot/a/b",
		"x/y", string(bytes.Repeat([]byte("a"), 77))} {
		_, err := s.Create(ctx, "default", name, CreateOptions{Size: mib})
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
		if name != "container/.." {
			_, err = s.Create(ctx, name+"/", "a", CreateOptions{Size: mib})
			require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
		}
	}
	for _, size := range []int64{-1, 0, 1, 4096, mib + 1, 1 << 50} {
		_, err := s.Create(ctx, "default", "a", CreateOptions{Size: size})
		require.True(t, errdefs.IsInvalidArgument(err), "%d: %v", size, err)
	}
	empty(t, s)
	for in, want := range map[string]int64{"1m": mib, "64K": 64 << 10, "2g": 2 << 30, "65536": 65536, "1t": 1 << 40} {
		n, err := ParseSize(in)
		require.NoError(t, err)
		require.Equal(t, want, n)
		back, err := ParseSize(FormatSize(n))
		require.NoError(t, err)
		require.Equal(t, n, back)
	}
	for _, in := range []string{"", "m", "-1m", "1.5g", "1mm", "9223372036854775807t", "100000t", "1k"} {
		_, err := ParseSize(in)
		require.Error(t, err, in)
	}
}

// A damaged stream makes nothing, wherever it is damaged.
func TestImportOfDamaged(t *testing.T) {
	ctx := t.Context()
	s := newStore(t, Options{})
	r, err := s.Create(ctx, "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	put(t, s.data(r.Ref), 5)
	var b bytes.Buffer
	_, err = s.Export(ctx, r.Ref, &b)
	require.NoError(t, err)
	for i := 0; i < b.Len(); i += max(1, b.Len()/50) {
		bad := bytes.Clone(b.Bytes())
		bad[i] ^= 4
		_, err := s.Import(ctx, "default", "b", bytes.NewReader(bad))
		require.Error(t, err, "byte %d", i)
		_, err = s.Import(ctx, "default", "b", bytes.NewReader(b.Bytes()[:i]))
		require.True(t, errdefs.IsDataLoss(err), "%v", err)
	}
	require.Len(t, s.List(""), 1)
	left, err := os.ReadDir(filepath.Join(s.root, "tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// What stands in the store and cannot be read is left alone, said, and in nobody's way.
func TestBrokenIsLeftAlone(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	s, err := Open(ctx, filepath.Join(dir, "r"), Options{})
	require.NoError(t, err)
	a, err := s.Create(ctx, "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	_, err = s.Create(ctx, "default", "b", CreateOptions{Size: mib})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, os.WriteFile(filepath.Join(s.dir(a.Ref), "meta"), []byte(`{"version":1,"size":`), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(s.root, "k", "something else"), 0o700))
	s = open(t, dir, Options{})
	require.Len(t, s.Problems(), 2)
	require.Len(t, s.List(""), 1)
	_, err = s.Create(ctx, "default", "a", CreateOptions{Size: mib})
	require.ErrorContains(t, err, "left alone")
	_, err = os.Stat(s.data(a.Ref))
	require.NoError(t, err)
	_, err = Open(ctx, s.root, Options{})
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
}

func second[T any](_ T, err error) error { return err }
