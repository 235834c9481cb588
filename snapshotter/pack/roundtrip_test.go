// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestRoundTrip: what a layer holds comes back from its pack, and the same layer gives the same bytes.
func TestRoundTrip(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			build := func() *maker {
				m := newMaker(t, 7)
				r := rand.New(rand.NewPCG(seed, 0))
				m.random(r, 1+r.IntN(400))
				return m
			}
			m := build()
			p := m.finish()
			got, err := p.Meta(t.Context())
			noError(t, err)
			sameMeta(t, m.meta, got)
			before := m.bytes()
			m.checkData(p)
			again := build()
			again.finish()
			if !bytes.Equal(before, again.bytes()) {
				t.Error("the same layer gives another pack")
			}
			want := testIdentity(7)
			id := p.Identity()
			want.Files, want.Entries, want.DataBytes = id.Files, id.Entries, id.DataBytes
			if id != want {
				t.Errorf("identity %+v, want %+v", id, want)
			}
		})
	}
}

// checkData compares the index with what was stored, fills the holes, and then all data.
func (m *maker) checkData(p *Pack) {
	t := m.t
	t.Helper()
	index, err := p.Index()
	noError(t, err)
	if index.Len() != uint32(len(m.data)) {
		t.Fatalf("%d numbers, want %d", index.Len(), len(m.data))
	}
	var files, bytesUsed, bytesHoles int64
	inline := map[*Inode]bool{}
	used := map[uint32]bool{}
	for todo := []*Node{m.meta.Root}; len(todo) > 0; todo = todo[1:] {
		if in := todo[0].Inode; in != nil && in.HasData() && in.Data.Layer == m.meta.Layer {
			used[in.Data.Number] = true
		} else if in != nil && isRegular(in.Mode) && in.Inline != "" && !inline[in] {
			inline[in] = true
			files++
			bytesUsed += in.Size
		}
		todo = append(todo, todo[0].Children...)
	}
	for n := range used {
		files++
		bytesUsed += int64(len(m.data[n]))
		if m.hole[n] {
			bytesHoles += int64(len(m.data[n]))
		}
	}
	if s := m.stats; s.Files != files || s.DataBytes != bytesUsed || s.HoleBytes != bytesHoles {
		t.Errorf("%+v, want %d files of %d bytes, %d in holes", s, files, bytesUsed, bytesHoles)
	}
	isHole := func(n uint32) bool { return m.hole[n] }
	noError(t, p.Verify(t.Context(), nil, isHole))
	f, err := os.OpenFile(p.File().Name(), os.O_RDWR, 0)
	noError(t, err)
	defer f.Close()
	for n, data := range m.data {
		e, ok := index.At(n)
		if ok != used[n] {
			t.Fatalf("file %d is used: %v, want %v", n, ok, used[n])
		}
		one, err := ReadExtent(f, p.Size(), n)
		if !ok {
			if !errdefs.IsNotFound(err) {
				t.Errorf("extent of file %d, which is not used: %v", n, err)
			}
			continue
		}
		if want := (Extent{e.Block, Sum(0, data), int64(len(data)), m.hole[n]}); err != nil || e != want || one != want {
			t.Fatalf("file %d: %+v and %+v (%v), want %+v", n, e, one, err, want)
		}
		if e.Hole {
			if err := p.Verify(t.Context(), nil, func(o uint32) bool { return o != n }); (Sum(0, make([]byte, len(data))) != e.Sum) != errdefs.IsDataLoss(err) {
				t.Errorf("hole %d is verified: %v", n, err)
			}
			noError(t, Fill(t.Context(), f, e, bytes.NewReader(data), nil))
		}
		r, err := p.ReadData(n)
		noError(t, err)
		if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, data) {
			t.Fatalf("file %d has other bytes, %v", n, err)
		}
	}
	read, want := 0, 0
	for n := range used {
		want += len(m.data[n])
	}
	noError(t, p.Verify(t.Context(), func(n int) error { read += n; return nil }, nil))
	if read != want {
		t.Errorf("pace was told of %d bytes, want %d", read, want)
	}
	stop := errors.New("stop")
	if err := p.Verify(t.Context(), func(int) error { return stop }, nil); want > 0 && !errors.Is(err, stop) {
		t.Errorf("pace has an error, Verify says %v", err)
	}
	// Filled, the pack is the one that had no holes, but for their marks.
	_, err = p.Meta(t.Context())
	noError(t, err)
}

// TestFillRefuses: only the bytes that belong into a hole are taken for it.
func TestFillRefuses(t *testing.T) {
	m := newMaker(t, 1)
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	m.add(m.meta.Root, "file", m.file(data, true))
	p := m.finish()
	e, err := ReadExtent(p.File(), p.Size(), 1)
	noError(t, err)
	other := bytes.Clone(data)
	other[2_999_999] ^= 1
	for what, src := range map[string][]byte{"shorter": data[1:], "longer": append(bytes.Clone(data), 0), "another": other, "empty": nil} {
		if err := Fill(t.Context(), m.w.File(), e, bytes.NewReader(src), nil); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	pieces := 0
	err = Fill(ctx, m.w.File(), e, bytes.NewReader(data), func(n int) error {
		if pieces++; pieces == 2 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || pieces != 2 {
		t.Errorf("cancelled: %v after %d pieces", err, pieces)
	}
	if err := Fill(t.Context(), p.File(), e, bytes.NewReader(data), nil); !errors.Is(err, unix.EBADF) {
		t.Errorf("not writable: %v", err)
	}
	noError(t, Fill(t.Context(), m.w.File(), e, bytes.NewReader(data), nil))
	noError(t, p.Verify(t.Context(), nil, nil))
}

// TestVerifyNames: the error of a damaged file says which it is.
func TestVerifyNames(t *testing.T) {
	m := newMaker(t, 1)
	dir := m.dir(m.meta.Root, "dir")
	for i := range 3 {
		m.add(dir, fmt.Sprint("file", i), m.file(bytes.Repeat([]byte{byte(i)}, 5000), false))
	}
	p := m.finish()
	e, err := ReadExtent(p.File(), p.Size(), 2)
	noError(t, err)
	_, err = m.w.File().WriteAt([]byte{99}, e.Offset()+4999)
	noError(t, err)
	err = p.Verify(t.Context(), nil, nil)
	if want := `file 2 ("/dir/file1") is damaged`; !errdefs.IsDataLoss(err) || !bytes.Contains([]byte(err.Error()), []byte(want)) {
		t.Errorf("%v, want %s", err, want)
	}
	noError(t, p.Verify(t.Context(), nil, func(n uint32) bool { return n == 2 }))
}
