// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// load opens the pack at path and reads all that its checksums are for.
func load(ctx context.Context, path string) (*Meta, error) {
	p, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	if _, err := p.Index(); err != nil {
		return nil, err
	}
	m, err := p.Meta(ctx)
	if err != nil {
		return nil, err
	}
	return m, p.Verify(ctx, nil, nil)
}

// reseal computes the checksums of a pack anew, as far as it is one.
func reseal(b []byte) []byte {
	le := binary.LittleEndian
	if len(b) < BlockSize+trailerSize {
		return b
	}
	erofs.SetChecksum(b)
	t := b[len(b)-trailerSize:]
	copy(t, footerMagic)
	head := trailer{identity: le.Uint32(t[12:]), meta: le.Uint64(t[16:]), footer: le.Uint64(t[24:])}
	if end := uint64(len(b) - trailerSize); head.meta <= head.footer && head.footer <= end && uint64(head.index()) <= end {
		le.PutUint32(t[36:], Sum(0, b[head.index():end]))
		le.PutUint32(t[40:], Sum(0, b[head.footer:min(head.footer+uint64(head.identity), end)]))
	}
	le.PutUint32(t[trailerSum:], Sum(0, t[:trailerSum]))
	h := sha256.New()
	h.Write(b[:BlockSize])
	if head.meta <= head.footer && head.footer <= uint64(len(b)-trailerSize) {
		h.Write(b[head.meta : len(b)-trailerSize+trailerSHA])
	}
	copy(t[trailerSHA:], h.Sum(nil))
	return b
}

// smallPack is a pack with one of each kind.
func smallPack(t testing.TB) *maker {
	m := newMaker(t, 5)
	m.random(rand.New(rand.NewPCG(1, 2)), 60)
	for n := range m.hole { // filled below
		m.hole[n] = false
	}
	p := m.finish()
	index, err := p.Index()
	noError(t, err)
	for n, data := range m.data {
		if e, ok := index.At(n); ok && e.Hole {
			noError(t, Fill(t.Context(), m.w.File(), e, bytes.NewReader(data), nil))
		}
	}
	return m
}

// TestDamage: each damage is found and classed.
func TestDamage(t *testing.T) {
	m := smallPack(t)
	good := m.bytes()
	p, err := Open(m.w.File().Name())
	noError(t, err)
	defer p.Close()
	name := filepath.Join(t.TempDir(), "pack")
	check := func(what string, data []byte, is func(error) bool) {
		t.Helper()
		noError(t, os.WriteFile(name, data, 0o600))
		if _, err := load(t.Context(), name); !is(err) || err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
	}
	whole := func(err error) bool { return err == nil }
	check("whole", good, whole)
	check("sealed again", reseal(slices.Clone(good)), whole)
	for _, n := range []int{0, 1, erofs.SuperOffset, BlockSize - 1, BlockSize, int(p.t.meta), int(p.t.footer) - 1, int(p.t.footer), len(good) - trailerSize, len(good) - 1} {
		check(fmt.Sprintf("cut off at %d", n), good[:n], errdefs.IsDataLoss)
	}
	check("longer", append(slices.Clone(good), 0), errdefs.IsDataLoss)
	check("a trailer more", append(slices.Clone(good), good[len(good)-trailerSize:]...), errdefs.IsDataLoss)
	flip := func(off int) {
		bad := slices.Clone(good)
		bad[off] ^= 0x10
		check(fmt.Sprintf("bit flipped at %d", off), bad, errdefs.IsDataLoss)
	}
	for off := 0; off < BlockSize; off += 13 {
		flip(off)
	}
	for off := int(p.t.meta); off < int(p.t.footer); off += 257 {
		flip(off)
	}
	for off := int(p.t.footer); off < len(good)-trailerSize; off += 5 {
		flip(off)
	}
	for off := len(good) - trailerSize; off < len(good); off++ {
		flip(off)
	}
	for n := range m.data {
		if e, err := ReadExtent(p.f, p.size, n); err == nil {
			flip(int(e.Offset() + e.Size - 1))
		}
	}
	unfinished := slices.Clone(good)
	clear(unfinished[:BlockSize])
	check("not finished", unfinished, errdefs.IsDataLoss)
	check("foreign", bytes.Repeat([]byte("text"), 1<<14), errdefs.IsInvalidArgument)
	rename := func(volume string) []byte {
		other := slices.Clone(good)
		copy(other[erofs.SuperOffset+64:], append([]byte(volume), make([]byte, 16-len(volume))...))
		return reseal(other)
	}
	check("another version", rename("nhybrid-pack-1"), errdefs.IsFailedPrecondition)
	check("another kind", rename("nhybrid-view-1")[:p.t.footer], errdefs.IsInvalidArgument)
	version := slices.Clone(good)
	version[len(good)-trailerSize+8]++
	check("another footer", reseal(version), errdefs.IsFailedPrecondition)
	if _, err := Open(filepath.Dir(name)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("directory: %v", err)
	}
	if _, err := Open(name + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if _, err := ReadExtent(bytes.NewReader(good[:len(good)-1]), int64(len(good)-1), 1); !errdefs.IsDataLoss(err) {
		t.Errorf("extent of a pack that is cut off: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Meta(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := p.Verify(ctx, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// FuzzOpen gives Open arbitrary bytes as a whole file, with checksums that are right. Nothing may panic, and errors
// have a class.
func FuzzOpen(f *testing.F) {
	m := newMaker(f, 5)
	m.add(m.meta.Root, "file", m.file([]byte("12345"), false))
	m.add(m.meta.Root, "dir", &Inode{Mode: 0o040755, Opaque: true})
	m.add(m.meta.Root, "gone", nil)
	m.finish()
	f.Add(m.bytes())
	f.Add(m.bytes()[:BlockSize])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		data = reseal(slices.Clone(data))
		name := filepath.Join(t.TempDir(), "pack")
		noError(t, os.WriteFile(name, data, 0o600))
		if _, err := load(t.Context(), name); err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}
		for n := range uint32(4) {
			if e, err := ReadExtent(bytes.NewReader(data), int64(len(data)), n); err == nil && (e.Size <= 0 || e.Offset()+e.Size > int64(len(data))) {
				t.Fatalf("file %d: %+v", n, e)
			}
		}
	})
}

// FuzzMeta puts arbitrary bytes where metadata and index of a pack are. What is accepted goes into a pack again, and
// comes back the same.
func FuzzMeta(f *testing.F) {
	for seed := range uint64(6) {
		m := newMaker(f, 5)
		m.random(rand.New(rand.NewPCG(seed, 9)), 12)
		p := m.finish()
		b := m.bytes()
		f.Add(b[p.t.meta:p.t.footer], m.w.index, uint16(p.super.MetaBlock), uint16(p.super.Inos))
	}
	f.Fuzz(func(t *testing.T, meta, index []byte, start, inos uint16) {
		if len(meta) > 1<<17 || len(index) > 1<<12 || start == 0 {
			return
		}
		meta = slices.Grow(slices.Clone(meta), BlockSize)
		for len(meta) == 0 || len(meta)%BlockSize != 0 {
			meta = append(meta, 0)
		}
		index = index[:len(index)/indexEntry*indexEntry]
		block := make([]byte, BlockSize)
		super := erofs.Super{Volume: volumeName, RootNid: packRootNid, Inos: uint64(inos), MetaBlock: uint32(start), Blocks: uint32(start) + uint32(len(meta)/BlockSize)}
		copy(block[erofs.SuperOffset:], super.Bytes())
		erofs.SetChecksum(block)
		tr := trailer{meta: uint64(start) * BlockSize, footer: uint64(super.Blocks) * BlockSize}
		footer, err := appendFooter(nil, tr, Identity{Layer: 5}, index)
		noError(t, err)
		h := sha256.New()
		h.Write(block)
		h.Write(meta)
		h.Write(footer)
		w := newMaker(t, 5).w
		for off, b := range map[int64][]byte{0: block, int64(tr.meta): meta, int64(tr.footer): h.Sum(footer)} {
			_, err := w.f.WriteAt(b, off)
			noError(t, err)
		}
		p, err := Open(w.f.Name())
		noError(t, err)
		defer p.Close()
		m, err := p.Meta(t.Context())
		if err != nil {
			if !errdefs.IsDataLoss(err) {
				t.Fatal(err)
			}
			return
		}
		x, err := p.Index()
		noError(t, err)
		again := newMaker(t, 5)
		for n := range x.Len() {
			e, ok := x.At(n + 1)
			if !ok {
				e.Size = 1
			}
			_, _, err := again.w.Begin(e.Size)
			noError(t, err)
			noError(t, again.w.Hole(e.Sum))
			_, err = again.w.End()
			noError(t, err)
		}
		again.meta = m
		got, err := again.finish().Meta(t.Context())
		noError(t, err)
		sameMeta(t, m, got)
	})
}
