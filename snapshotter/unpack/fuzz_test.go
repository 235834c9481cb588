// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// FuzzLayer unpacks anything. What Layer accepts, a pack has to hold.
func FuzzLayer(f *testing.F) {
	for seed := range uint64(20) {
		layer := newGenerator(f, seed).layer()
		f.Add(layer)
		f.Add(gzipOf(f, layer))
		f.Add(zstdOf(f, layer))
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		w, err := pack.Create(filepath.Join(t.TempDir(), "p"), pack.WriterOptions{})
		must(t, err)
		defer func() { must(t, w.Abort()) }()
		m, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(blob)), w, wantOf(blob, nil),
			Options{Layer: 1, MaxBytes: 16 << 20, MaxMetadata: 16 << 20})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatal(err)
			}
			return
		}
		_, err = w.Finish(m, pack.Identity{Layer: 1})
		must(t, err)
		p, err := pack.Open(w.File().Name())
		must(t, err)
		defer p.Close()
		must(t, p.Verify(t.Context(), nil, nil))
		_, err = p.Meta(t.Context())
		must(t, err)
	})
}

// FuzzTar goes past compression and checksums of headers: a layer by the
// generator, with bytes changed.
func FuzzTar(f *testing.F) {
	f.Add(uint64(1), 100, byte(1))
	f.Fuzz(func(t *testing.T, seed uint64, at int, change byte) {
		layer := newGenerator(t, seed).layer()
		layer[uint(at)%uint(len(layer))] ^= change
		checksums(layer)
		p := &memoryPack{}
		m, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(layer)), p, wantOf(layer, nil), Options{MaxBytes: 16 << 20})
		if err == nil {
			ofMeta(t, m, p.data)
		} else if !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}
	})
}

// checksums makes those of all blocks that look like headers right.
func checksums(b []byte) {
	for ; len(b) >= 512; b = b[512:] {
		if h := b[:512]; string(h[257:262]) == "ustar" {
			setChecksum(h)
		}
	}
}
