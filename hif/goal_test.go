// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// shelf is a profile.Store in memory.
type shelf struct {
	mu sync.Mutex
	m  map[digest.Digest][]byte
}

func (s *shelf) Get(image digest.Digest) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[image], nil
}

func (s *shelf) Update(image digest.Digest, change func([]byte) ([]byte, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, err := change(s.m[image])
	if err != nil {
		return err
	}
	if s.m == nil {
		s.m = map[digest.Digest][]byte{}
	}
	s.m[image] = data
	if data == nil {
		delete(s.m, image)
	}
	return nil
}

func (s *shelf) Each(f func(digest.Digest, []byte) error) error {
	s.mu.Lock()
	all := maps.Clone(s.m)
	s.mu.Unlock()
	for d, data := range all {
		if err := f(d, data); err != nil {
			return err
		}
	}
	return nil
}

// still is a Store and a migrate.Host of layers that stay as they are. All of
// them are at home; what is on NVM stands in a directory.
type still struct {
	Store
	root   string
	images []Image
	layers []plan.Layer
	files  []File
	used   int64
	rounds atomic.Int64
	lists  atomic.Int64 // calls of Files
	// container is the image of every container; "": there is none.
	container digest.Digest
}

func (s *still) ImageOf(context.Context, string, string) (digest.Digest, string, error) {
	if s.container == "" {
		return "", "", errdefs.ErrNotFound
	}
	return s.container, "", nil
}

func (s *still) Images(context.Context) ([]Image, error) { return slices.Clone(s.images), nil }
func (s *still) Layers(context.Context) ([]plan.Layer, error) {
	s.rounds.Add(1)
	return slices.Clone(s.layers), nil
}
func (s *still) Files(ctx context.Context, i Image, yield func(File) bool) error {
	s.lists.Add(1)
	return files{all: s.files}.Files(ctx, i, yield)
}
func (s *still) LetGo(context.Context)                         {}
func (s *still) StartBegins(context.Context, string, []string) {}
func (s *still) StartsEnded(context.Context, string)           {}
func (s *still) Space() (plan.Space, error) {
	return plan.Space{Free: 1<<30 - s.used, Total: 2 << 30}, nil
}
func (s *still) DataRoot() string        { return s.root }
func (s *still) PartsPath(string) string { return "" }
func (s *still) Busy() (string, bool)    { return "", false }
func (s *still) BringHome(context.Context, string, func(int) error) error {
	return errors.New("not here")
}
func (s *still) Settled(context.Context, string, int64) error { return nil }
func (s *still) PartsChanged(context.Context, string) error   { return nil }
func (s *still) Held() int64                                  { return 0 }
func (s *still) Free() (int64, error)                         { return 1 << 30, nil }
func (s *still) Gone(string) error                            { return errors.New("it is here") }
func (s *still) OnNVM(id string) iter.Seq2[migrate.File, error] {
	return func(yield func(migrate.File, error) bool) {
		names, _ := filepath.Glob(filepath.Join(s.root, id, "*/*"))
		for _, name := range names {
			if info, err := os.Stat(name); !yield(migrate.File{Redirect: name[len(s.root):], Bytes: info.Size()}, err) {
				return
			}
		}
	}
}
func (s *still) Stands(redirect string) (bool, error) {
	_, err := os.Stat(s.root + redirect)
	return err == nil, nil
}
func (s *still) Promote(context.Context, string, func(int) error) (int64, error) {
	return 0, errors.New("not here")
}
func (s *still) Demote(redirect string) (freed, held int64, err error) {
	return 1, 0, os.Remove(s.root + redirect)
}

// put makes a file of the image with its data on NVM.
func (s *still) put(t *testing.T, path string, ref pack.Ref, data []byte) (onNVM string) {
	t.Helper()
	s.files = append(s.files, File{path, path[1:], ref.Redirect(), int64(len(data))})
	onNVM = s.root + ref.Redirect()
	require.NoError(t, os.MkdirAll(filepath.Dir(onNVM), 0o700))
	require.NoError(t, os.WriteFile(onNVM, data, 0o600))
	return onNVM
}

func newManager(t *testing.T, s *still, profiles *shelf) *Manager {
	t.Helper()
	s.root = t.TempDir()
	m, err := New(t.Context(), Config{Migrate: true}, s, s, Books{Profiles: profiles, Predictions: &shelf{}, Origins: &shelf{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func imageOf(name, layer string) Image {
	i := Image{Namespace: "default", Name: name, View: "9" + layer, Chain: []string{layer}}
	i.Digest, i.Layers = digest.FromString(name), []digest.Digest{digest.FromString(layer)}
	return i
}

// A profile that cannot be read, of a later version say, stops neither the
// others nor costs its image the files that it needs.
func TestUnreadableProfileConcernsItsImageOnly(t *testing.T) {
	good, bad := imageOf("good", "1"), imageOf("bad", "2")
	s := &still{images: []Image{bad, good}, layers: []plan.Layer{
		{ID: "1", Tier: placement.HDD, NVM: 8192, Used: time.Now()},
		{ID: "2", Tier: placement.HDD, NVM: 8192, Used: time.Now()},
	}}
	m := newManager(t, s, &shelf{m: map[digest.Digest][]byte{bad.Digest: []byte(`{"schema": 4242}`)}})
	one := s.put(t, "/one", pack.Ref{Layer: 1, Number: 1}, []byte("hello"))
	two := s.put(t, "/two", pack.Ref{Layer: 2, Number: 1}, []byte("hello"))
	require.NoError(t, m.apply(t.Context(), s.images))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	require.NoError(t, m.engine.Wait(ctx))
	require.NoFileExists(t, one, "nobody needs it")
	require.FileExists(t, two, "nobody knows who needs it")
}

// An image that came after the manager last looked may have the layers of one
// that it knows: what a start is of says its container, or else it counts for both.
func TestGuessedImage(t *testing.T) {
	one, two := imageOf("one", "1"), imageOf("two", "1")
	s := &still{images: []Image{one, two}}
	m := newManager(t, s, &shelf{})
	m.images = []Image{one}
	o := &openStart{Start: Start{Namespace: "default"}}
	o.View = one.View
	guessed, ok := m.guess(o)
	require.True(t, ok)
	require.Equal(t, one, guessed)
	require.Equal(t, one.Digest, o.image)
	got, err := m.candidates(t.Context(), o)
	require.NoError(t, err)
	require.Equal(t, []Image{one, two}, got)
	s.container = two.Digest
	require.Equal(t, two.Digest, m.identify(o))
	got, err = m.candidates(t.Context(), o)
	require.NoError(t, err)
	require.Equal(t, []Image{two}, got)
}

// A pause holds, also where everything was to be moved at once.
func TestPauseEndsAHurry(t *testing.T) {
	s := &still{}
	m := newManager(t, s, &shelf{})
	m.mu.Lock()
	m.hurry = true // as MigrateNow leaves it
	m.mu.Unlock()
	require.NoError(t, m.apply(t.Context(), nil))
	require.NoError(t, m.Pause())
	require.NoError(t, m.apply(t.Context(), nil))
	require.Eventually(t, func() bool { return m.engine.Reached() }, 10*time.Second, time.Millisecond)
	require.Eventually(t, func() bool { return m.engine.Progress().State == migrate.Paused }, 10*time.Second, time.Millisecond)
}

// Moving everything at once ends, also where the engine needs longer to look at
// its plan than the manager to make it.
func TestHurryEnds(t *testing.T) {
	const many = 5000
	image := imageOf("many", "1")
	s := &still{images: []Image{image}, layers: []plan.Layer{{ID: "1", Tier: placement.HDD, NVM: 1, Used: time.Now()}}}
	m := newManager(t, s, &shelf{})
	for i := range many {
		s.put(t, fmt.Sprint("/", i), pack.Ref{Layer: 1, Number: uint32(i + 1)}, []byte("x"))
	}
	_, matched, err := m.SetRule(t.Context(), image, profile.Rule{Glob: "**", Action: profile.Pin})
	require.NoError(t, err)
	require.Len(t, matched, many)
	m.Start()
	require.NoError(t, m.MigrateNow(t.Context()))
	require.Eventually(t, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return !m.hurry
	}, 20*time.Second, time.Millisecond)
	require.True(t, m.engine.Reached())
	require.Less(t, s.rounds.Load(), int64(10), "rounds, each of which reads every profile")
}

// The loop never finds a hurry that has nothing to do yet: it would end it.
func TestHurryBegins(t *testing.T) {
	m := newManager(t, &still{}, &shelf{})
	over, cancel := context.WithCancel(t.Context())
	cancel() // nobody makes rounds here
	for range 2000 {
		m.mu.Lock()
		m.hurry, m.seen = false, m.kicks
		m.mu.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = m.MigrateNow(over)
		}()
		for calm := true; calm; {
			m.mu.Lock()
			calm = !m.hurry
			settling := m.settling()
			m.mu.Unlock()
			require.True(t, calm || settling)
		}
		require.False(t, m.calm())
		<-done
	}
}

// An idle host does not read all profiles each minute.
func TestNothingHappened(t *testing.T) {
	s := &still{}
	m := newManager(t, s, &shelf{})
	require.False(t, m.still(), "nothing was looked at yet")
	look := func() { // learning, which goes on beside, may ask for another round
		t.Helper()
		require.Eventually(t, func() bool {
			m.round()
			return m.still()
		}, 10*time.Second, time.Millisecond)
	}
	look()
	m.Kick()
	require.False(t, m.still())
	look()
	s.used = 100 << 20
	require.False(t, m.still(), "somebody has taken space")
	look()
	m.mu.Lock()
	m.looked = time.Now().Add(-2 * lookAnyway)
	m.mu.Unlock()
	require.False(t, m.still())
}
