// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

var (
	day   = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	image = Image{Digest: dig("image"), Repository: "docker.io/library/redis", Layers: []digest.Digest{dig("base"), dig("app")}}
)

func dig(s string) digest.Digest { return digest.FromString(s) }

// listing is an image's files.
type listing []Entry

func (l listing) Lookup(p Path) (Entry, bool) {
	i := slices.IndexFunc(l, func(e Entry) bool { return e.Path == p })
	if i < 0 {
		return Entry{}, false
	}
	return l[i], true
}

func (l listing) All(yield func(Entry) bool) {
	for _, e := range l {
		if !yield(e) {
			return
		}
	}
}

// memory is a store in memory.
type memory struct {
	mu sync.Mutex
	m  map[digest.Digest][]byte
}

func (s *memory) Get(image digest.Digest) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[image], nil
}

func (s *memory) Update(image digest.Digest, change func([]byte) ([]byte, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, err := change(s.m[image])
	if err != nil {
		return err
	}
	if s.m == nil {
		s.m = map[digest.Digest][]byte{}
	}
	if data == nil {
		delete(s.m, image)
	} else {
		s.m[image] = data
	}
	return nil
}

func (s *memory) Each(f func(digest.Digest, []byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, data := range s.m {
		if err := f(d, data); err != nil {
			return err
		}
	}
	return nil
}

func uses(paths ...string) (out []Use) {
	for _, p := range paths {
		out = append(out, Use{Entry: Entry{Path: Path(p), Size: 100}, Kind: Read, Touched: 10, Ranges: []Range{{0, 10}}})
	}
	return out
}

func names(p Profile) (out []string) {
	for _, f := range p.Files {
		out = append(out, string(f.Path))
	}
	return out
}

func start(n int, paths ...string) Start {
	return Start{At: day.Add(time.Duration(n) * time.Hour), Complete: true, Files: uses(paths...)}
}

func TestMerge(t *testing.T) {
	p := Merge(New(image, day), start(1, "a", "b", "c"), DefaultAgeing)
	require.Equal(t, []string{"a", "b", "c"}, names(p))
	require.Equal(t, 1, p.Starts)
	require.True(t, p.Complete())
	require.Equal(t, 1.0, p.Files[0].Weight)
	require.NoError(t, p.Validate())

	before := fmt.Sprint(p)
	s := start(2, "c", "new", "a")
	s.Files[0].Kind, s.Files[0].Touched, s.Files[0].Ranges = Exec, 30, []Range{{50, 30}}
	q := Merge(p, s, DefaultAgeing)
	require.Equal(t, before, fmt.Sprint(p), "the old value stays")
	require.Equal(t, []string{"c", "new", "a", "b"}, names(q), "order of the new start; b stays behind a")
	require.Equal(t, File{Path: "c", Size: 100, Kind: Exec, Starts: 2, LastStart: 2, Weight: 1, Touched: 30, Ranges: []Range{{0, 10}, {50, 30}}}, q.Files[0])
	require.InDelta(t, 0.2, q.Files[1].Weight, 1e-9)
	require.InDelta(t, 0.8, q.Files[3].Weight, 1e-9)
	require.Equal(t, 1, q.Files[3].LastStart)

	// What an incomplete start did not show proves nothing.
	s = start(3, "a")
	s.Complete = false
	r := Merge(q, s, DefaultAgeing)
	require.Equal(t, []int{2, 1}, []int{r.Starts, r.Incomplete})
	require.InDelta(t, 0.8, r.Files[slices.Index(names(r), "b")].Weight, 1e-9)
	require.NoError(t, r.Validate())

	// Unknown stays unknown only as long as nothing is known.
	s = start(4, "a")
	s.Files[0].Touched, s.Files[0].Ranges = -1, nil
	require.EqualValues(t, 10, Merge(p, s, DefaultAgeing).Files[0].Touched)

	// Other content under the same path begins anew.
	s = start(5, "a")
	s.Files[0].Size = 200
	got := Merge(p, s, DefaultAgeing).Files[0]
	require.EqualValues(t, []any{int64(200), 1}, []any{got.Size, got.Starts})

	// A start that names a file twice counts it once.
	require.Equal(t, 2, Merge(p, start(6, "a", "a"), DefaultAgeing).Files[0].Starts)
}

func TestAgeing(t *testing.T) {
	p := Merge(New(image, day), start(0, "always", "once"), DefaultAgeing)
	for i := 1; i < 10; i++ {
		p = Merge(p, start(i, "always"), DefaultAgeing)
		require.Contains(t, names(p), "once", "after %d starts without it", i)
	}
	p = Merge(p, start(10, "always"), DefaultAgeing)
	require.Equal(t, []string{"always"}, names(p), "ten starts without it")

	p = Merge(p, start(11, "always", "stray"), DefaultAgeing)
	for i := range 6 {
		p = Merge(p, start(12+i, "always"), DefaultAgeing)
		require.Contains(t, names(p), "stray", i)
	}
	p = Merge(p, start(18, "always"), DefaultAgeing)
	require.Equal(t, []string{"always"}, names(p))

	// A file of every second start never leaves.
	for i := range 100 {
		s := start(20+i, "always", "second")
		s.Files = s.Files[:1+i%2]
		p = Merge(p, s, DefaultAgeing)
		if i > 0 {
			require.Contains(t, names(p), "second")
		}
		require.NoError(t, p.Validate())
	}
	for _, tc := range []struct {
		f      File
		starts int
		want   bool
	}{
		{File{LastStart: 5, Weight: 1}, 14, true},
		{File{LastStart: 5, Weight: 1}, 15, false},
		{File{LastStart: 5, Weight: 0.05}, 5, true},
		{File{LastStart: 5, Weight: 0.049}, 5, false},
	} {
		require.Equal(t, tc.want, DefaultAgeing.Stays(tc.f, tc.starts), "%+v", tc)
	}
}

func TestUnionIsBounded(t *testing.T) {
	var a, b []Range
	for i := range int64(MaxRanges) {
		a = append(a, Range{i * 30000, 10})
		b = append(b, Range{i*30000 + 15000, 10})
	}
	u := union(a, b)
	require.LessOrEqual(t, len(u), MaxRanges)
	f := File{Path: "a", Size: 1 << 40, Kind: Read, Ranges: u}
	require.NoError(t, f.check())
	for _, r := range append(a, b...) {
		require.True(t, slices.ContainsFunc(u, func(o Range) bool {
			return o.Offset <= r.Offset && o.Offset+o.Length >= r.Offset+r.Length
		}))
	}
}

func TestInherit(t *testing.T) {
	old := Merge(New(image, day), start(1, "bin/app", "lib/same", "lib/sized", "lib/grown", "lib/moved", "gone", "lib/digest", "lib/other"), DefaultAgeing)
	for i := range old.Files {
		old.Files[i].Layer = 1
	}
	old.Files[1].Layer = 0
	old.Files[4].Digest = dig("moved")
	old.Files[6].Digest = dig("content")
	old.Files[7].Digest = dig("one")
	require.NoError(t, old.Set(Rule{"etc/**", Pin}, day))
	next := Image{Digest: dig("image 2"), Repository: image.Repository, Layers: []digest.Digest{dig("app 2"), dig("base")}}
	p := Inherit(old, next, listing{
		{"bin/app", 0, 100, ""}, {"lib/same", 1, 100, ""}, {"lib/sized", 0, 100, ""}, {"lib/grown", 0, 101, ""},
		{"lib/new/name", 0, 100, dig("moved")}, {"lib/digest", 0, 100, dig("content")}, {"lib/other", 0, 100, dig("two")},
	})
	require.Equal(t, []string{"bin/app", "lib/same", "lib/sized", "lib/grown", "lib/new/name", "lib/digest", "lib/other"}, names(p))
	var weights []float64
	var touched []int64
	for _, f := range p.Files {
		weights, touched = append(weights, f.Weight), append(touched, f.Touched)
	}
	require.Equal(t, []float64{0.8, 1, 0.8, 0.5, 1, 1, 0.5}, weights)
	require.Equal(t, []int64{-1, 10, -1, -1, 10, 10, -1}, touched)
	require.Equal(t, old.Image, p.Inherited)
	require.Equal(t, old.Rules, p.Rules)
	require.False(t, p.Complete())
	require.NoError(t, p.Validate())

	// The first start of its own settles what was unsure.
	q := Merge(p, Start{At: day, Complete: true, Files: []Use{{Entry: Entry{Path: "bin/app", Layer: 0, Size: 100}, Kind: Exec, Touched: -1}}}, DefaultAgeing)
	require.InDelta(t, 0.84, q.Files[0].Weight, 1e-9)
	require.Len(t, q.Files, 7)
}

func TestRules(t *testing.T) {
	files := listing{{"etc/a", 0, 1, ""}, {"etc/b/c", 0, 1, ""}, {"usr/lib/x.so.1", 0, 1, ""}, {"usr/share/doc", 0, 1, ""}}
	p := Merge(New(image, day), start(1, "usr/share/doc", "bin/sh"), DefaultAgeing)
	set := func(glob string, a Action) {
		t.Helper()
		r, err := NewRule(glob, a)
		require.NoError(t, err)
		require.NoError(t, p.Set(r, day))
	}
	hot := func() (out []string) {
		for _, h := range p.Hot(files) {
			s := string(h.Path)
			if h.Pinned {
				s += "!"
			}
			out = append(out, s)
		}
		return out
	}
	require.Equal(t, []string{"usr/share/doc", "bin/sh"}, hot())
	set("/etc/**", Pin)
	set("**/*.so{,.*}", Pin)
	set("bin/*", Pin)
	require.Equal(t, []string{"usr/share/doc", "bin/sh!", "etc/a!", "etc/b/c!", "usr/lib/x.so.1!"}, hot())
	set("usr/share/**", Exclude)
	set("etc/b/*", Normal)
	require.Equal(t, []string{"bin/sh!", "etc/a!", "usr/lib/x.so.1!"}, hot())
	set("etc/**", Normal)
	require.Equal(t, []string{"bin/sh!", "usr/lib/x.so.1!"}, hot())
	set("bin/*", Exclude)
	require.Equal(t, []string{"usr/lib/x.so.1!"}, hot())
	require.NoError(t, p.Validate())
	for _, bad := range []string{"", "/", "a[", "{a", strings.Repeat("a", maxGlob+1), strings.Repeat("{a,a}", 5), "{" + strings.Repeat("a,", 40) + "a}"} {
		_, err := NewRule(bad, Pin)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
	_, err := NewRule("a", "warm")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for i := range MaxRules {
		err = p.Set(Rule{fmt.Sprint("f", i), Pin}, day)
	}
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
}

func TestDiff(t *testing.T) {
	a := Merge(New(image, day), start(1, "same", "used", "grown", "gone"), DefaultAgeing)
	b := Merge(New(image, day), start(1, "new", "grown", "same", "used"), DefaultAgeing)
	b.Files[1].Size = 7
	b.Files[3].Touched = 99
	d := Diff(a, b)
	require.Equal(t, []Path{"new"}, []Path{d.Added[0].Path})
	require.Equal(t, []Path{"gone"}, []Path{d.Removed[0].Path})
	require.Len(t, d.Changed, 2)
	require.Equal(t, []any{Path("grown"), true}, []any{d.Changed[0].New.Path, d.Changed[0].Content})
	require.Equal(t, []any{Path("used"), false}, []any{d.Changed[1].New.Path, d.Changed[1].Content})
	require.Equal(t, 1, d.Same)
	require.EqualValues(t, 307, Bytes(b.Files))
	require.Equal(t, Difference{Same: 4}, Diff(a, a))
}

func TestFromTrace(t *testing.T) {
	names := map[uint32]Path{1: "bin/sh", 2: "../x", 3: "lib/libc.so.6", 4: "lib/libx.so", 5: "a.sock", 6: "grown"}
	file := func(layer uint64, number uint32, kind trace.Kind) trace.File {
		return trace.File{Ref: pack.Ref{Layer: layer, Number: number}, Kind: kind, Size: 1}
	}
	tr := trace.Trace{Began: day, Duration: time.Minute, Complete: true, Files: []trace.File{
		{Ref: pack.Ref{Layer: 17, Number: 1}, Kind: trace.Exec, Size: 1, Touched: 1, Ranges: []trace.Range{{Offset: 0, Length: 1}}},
		file(99, 1, trace.Read), file(17, 2, trace.Read), file(17, 3, trace.Exec), file(17, 4, trace.Read), file(17, 5, trace.Read),
	}}
	tr.Files = append(tr.Files, trace.File{Ref: pack.Ref{Layer: 17, Number: 6}, Size: 2})
	s, foreign := FromTrace(tr, func(ref pack.Ref) (Entry, bool) {
		return Entry{Path: names[ref.Number], Layer: 1, Size: 1}, ref.Layer == 17
	})
	require.Equal(t, 3, foreign)
	use := func(path Path, kind Kind) Use { return Use{Entry: Entry{Path: path, Layer: 1, Size: 1}, Kind: kind} }
	sh := use("bin/sh", Exec)
	sh.Touched, sh.Ranges = 1, []Range{{0, 1}}
	require.Equal(t, Start{At: day.Add(time.Minute), Complete: true, Files: []Use{
		sh, use("lib/libc.so.6", Exec), use("lib/libx.so", Library), use("a.sock", Read),
	}}, s)
	p := Merge(New(image, day), s, DefaultAgeing)
	require.NoError(t, p.Validate())
}

func TestBook(t *testing.T) {
	b := &Book{Store: &memory{}, Ageing: DefaultAgeing}
	_, err := b.Get(image.Digest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorIs(t, b.Remove(image.Digest), errdefs.ErrNotFound)
	for i := range 3 {
		_, err = b.Record(image, start(i, "a", "b"), listing{})
		require.NoError(t, err)
	}
	_, err = b.SetRule(image, Rule{"c*", Pin}, listing{}, day)
	require.NoError(t, err)
	p, err := b.Get(image.Digest)
	require.NoError(t, err)
	require.Equal(t, 3, p.Starts)

	// The next version inherits, another repository does not.
	next := Image{Digest: dig("2"), Repository: image.Repository, Layers: image.Layers}
	q, err := b.Record(next, start(9, "b"), listing{{"a", 0, 100, ""}, {"b", 0, 100, ""}})
	require.NoError(t, err)
	require.Equal(t, []string{"a", "b"}, names(q))
	require.Equal(t, p.Rules, q.Rules)
	require.Equal(t, image.Digest, q.Inherited)
	other := Image{Digest: dig("3"), Repository: "docker.io/library/nginx", Layers: image.Layers}
	q, err = b.Record(other, start(9, "z"), listing{{"a", 0, 100, ""}})
	require.NoError(t, err)
	require.Equal(t, []string{"z"}, names(q))
	require.Empty(t, q.Inherited)

	// An imported profile does not overrule the operator.
	in := p
	in.Rules = []Rule{{"**", Exclude}}
	require.NoError(t, b.Put(in))
	got, err := b.Get(image.Digest)
	require.NoError(t, err)
	require.Equal(t, p.Rules, got.Rules)
	// One that was fetched while a start was recorded does not replace it.
	require.ErrorIs(t, b.PutNew(in), errdefs.ErrAlreadyExists)
	bare := New(Image{Digest: dig("4"), Layers: image.Layers}, day)
	require.NoError(t, bare.Set(Rule{"c*", Pin}, day))
	require.NoError(t, b.Put(bare))
	in.Image = bare.Image
	require.NoError(t, b.PutNew(in), "rules alone are no knowledge")
	got, err = b.Get(bare.Image)
	require.NoError(t, err)
	require.Equal(t, bare.Rules, got.Rules)
	require.Equal(t, names(p), names(got))
	require.NoError(t, b.Remove(image.Digest))
	_, err = b.Get(image.Digest)
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	var buf bytes.Buffer
	require.NoError(t, Encode(&buf, p))
	bad := &Book{Store: &memory{m: map[digest.Digest][]byte{image.Digest: []byte("{}")}}}
	_, err = bad.Get(image.Digest)
	require.ErrorContains(t, err, "stored profile")
	_, err = bad.Record(next, start(9, "b"), listing{})
	require.NoError(t, err, "it does not stand in the way of others")
	bad = &Book{Store: &memory{m: map[digest.Digest][]byte{image.Digest: []byte(`{"schema": 4242, "repository": "` + image.Repository + `"}`)}}}
	_, err = bad.Record(next, start(9, "b"), listing{})
	require.NoError(t, err)

	// Starts that end at the same time are all counted.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := b.Record(other, start(i, "z"), listing{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err = b.Get(other.Digest)
	require.NoError(t, err)
	require.Equal(t, 21, got.Starts)
}
