// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// layers stands for those who share the filesystem and keep to what is held for regions.
type layers struct {
	mu       sync.Mutex
	promised int64
	reserve  int64 // what stays free
	dir      string
}

func (l *layers) others() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.promised
}

// ask promises size bytes to a layer if there is room.
func (l *layers) ask(t *testing.T, s *Store, size int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(l.dir, &fs))
	if size > int64(fs.Bavail)*fs.Bsize-l.reserve-s.Held()-l.promised {
		return false
	}
	l.promised += size
	return true
}

// write does what was promised, a part of it.
func (l *layers) write(t *testing.T, name string, size int64, done bool) {
	require.NoError(t, os.WriteFile(filepath.Join(l.dir, name), make([]byte, size), 0o600))
	if done {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.promised -= size
	}
}

// Room that is kept for regions is theirs, whatever layers do; what is promised to layers is not given to regions.
func TestReserve(t *testing.T) {
	ctx := t.Context()
	dir := filesystem(t, "tmpfs", 64*mib)
	l := &layers{dir: dir, reserve: 4 * mib}
	s := open(t, dir, Options{Limit: 50 * mib, Headroom: 4 * mib, Reserve: 24 * mib, Others: l.others})
	create := func(name string, size int64) error {
		_, err := s.Create(ctx, "default", name, CreateOptions{Size: size})
		if err != nil {
			require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
		}
		return err
	}
	require.EqualValues(t, 24*mib, s.Held())
	require.False(t, l.ask(t, s, 37*mib))
	require.True(t, l.ask(t, s, 30*mib))

	// 64 less 4 that stay free less 30 for the layer.
	require.ErrorContains(t, create("x", 31*mib), "NVM has room for 30")
	require.NoError(t, create("x", 8*mib))
	require.EqualValues(t, 16*mib, s.Held(), "what a region has is no longer kept for others")

	// A layer that is half written has taken room, and its promise stands as a whole: nothing of what is kept is lost by that.
	l.write(t, "half", 20*mib, false)
	require.NoError(t, create("y", 16*mib))
	require.Zero(t, s.Held())
	require.Error(t, create("z", 7*mib))
	l.write(t, "half", 30*mib, true)
	require.NoError(t, create("z", 4*mib))

	// What goes is kept again.
	require.NoError(t, s.Remove(ctx, vol("y")))
	require.EqualValues(t, 12*mib, s.Held())
	require.False(t, l.ask(t, s, 7*mib))
	b, err := s.Books()
	require.NoError(t, err)
	require.EqualValues(t, 24*mib, b.Reserve)
	require.Zero(t, b.Others+b.Making)
}

// Layers and regions that ask at the same time never get more than there is together, and regions never less than is kept for them.
func TestConcurrentAdmissionOfBoth(t *testing.T) {
	for round := range 20 {
		dir := filesystem(t, "tmpfs", 48*mib)
		l := &layers{dir: dir}
		s, err := Open(t.Context(), filepath.Join(dir, "r"), Options{Reserve: 16 * mib, Others: l.others})
		require.NoError(t, err)
		var wg sync.WaitGroup
		var got sync.Map
		for i := range 16 {
			wg.Go(func() { l.ask(t, s, 3*mib) })
			wg.Go(func() {
				if _, err := s.Create(t.Context(), "a", fmt.Sprint("v", i, "x"), CreateOptions{Size: 2 * mib}); err == nil {
					got.Store(i, true)
				} else if !errdefs.IsResourceExhausted(err) {
					t.Errorf("region: %v", err)
				}
			})
		}
		wg.Wait()
		n := int64(0)
		got.Range(func(any, any) bool { n++; return true })
		require.LessOrEqual(t, 2*mib*n+l.promised, int64(48*mib), "round %d", round)
		require.GreaterOrEqual(t, n, int64(8), "round %d", round)
		require.NoError(t, s.Close())
	}
}

// A layer that asks right after a region has looked at what layers have sees the region.
func TestAdmissionSeesTheOther(t *testing.T) {
	dir := filesystem(t, "tmpfs", 48*mib)
	l := &layers{dir: dir}
	var s *Store
	var got bool
	s = open(t, dir, Options{Others: func() int64 {
		n := l.others()
		got = got || l.ask(t, s, 30*mib)
		return n
	}})
	_, err := s.Create(t.Context(), "default", "x", CreateOptions{Size: 30 * mib})
	require.NoError(t, err)
	require.False(t, got)
	require.False(t, l.ask(t, s, 30*mib))
}

// What is being made is in the books once, at every moment: a region at the limit would be refused for its own sake, or two would get one room.
func TestCountedOnce(t *testing.T) {
	ctx := t.Context()
	var s *Store
	var seen []Books
	look := func([]string) {
		if s != nil { // else it is being opened
			b, err := s.Books()
			require.NoError(t, err)
			seen = append(seen, b)
		}
	}
	s = newStore(t, Options{Limit: 8 * mib, Volumes: look})
	_, err := s.Create(ctx, "default", "a", CreateOptions{Size: 4 * mib})
	require.NoError(t, err)
	_, err = s.Resize(ctx, vol("a"), 8*mib)
	require.NoError(t, err)
	require.NotEmpty(t, seen)
	for _, b := range seen {
		require.Zero(t, b.Making)
		require.EqualValues(t, 4*mib, b.Promised)
	}

	p := newStore(t, Options{Pool: map[int64]int{mib: 3}, Limit: 4 * mib})
	for full := false; !full; {
		b, err := p.Books()
		require.NoError(t, err)
		require.LessOrEqual(t, b.Pool+b.Making, int64(3*mib))
		full = b.Pool == 3*mib
	}
	_, err = p.Create(ctx, "default", "b", CreateOptions{Size: 4 * mib})
	require.NoError(t, err)
}
