// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package image makes OCI images for tests, the demo and benchmarks: from generated files in memory (Tiny, Busybox), or
// from Debian packages with a cache on disk (Builder, FromTable).
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// layer is a v1.Layer whose digests are known: the library would compress the content anew for each of them.
type layer struct {
	Digests
	open func() (io.ReadCloser, error) // compressed
}

// Digests are what a manifest and a config say of a layer.
type Digests struct {
	Digest           v1.Hash `json:"digest"`
	DiffID           v1.Hash `json:"diffID"`
	CompressedSize   int64   `json:"compressedSize"`
	UncompressedSize int64   `json:"uncompressedSize"`
}

func (l *layer) Digest() (v1.Hash, error)             { return l.Digests.Digest, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return l.Digests.DiffID, nil }
func (l *layer) Size() (int64, error)                 { return l.CompressedSize, nil }
func (l *layer) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }
func (l *layer) Compressed() (io.ReadCloser, error)   { return l.open() }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return gunzip(l.open) }

func gunzip(open func() (io.ReadCloser, error)) (io.ReadCloser, error) {
	compressed, err := open()
	if err != nil {
		return nil, err
	}
	plain, err := gzip.NewReader(compressed)
	if err != nil {
		_ = compressed.Close()
		return nil, fmt.Errorf("uncompress layer: %w", err)
	}
	return struct {
		io.Reader
		io.Closer
	}{plain, compressed}, nil
}

// meter counts and hashes what passes.
type meter struct {
	hash hash.Hash
	n    int64
}

func (m *meter) Write(p []byte) (int, error) {
	m.n += int64(len(p))
	return m.hash.Write(p)
}

func (m *meter) sum() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(m.hash.Sum(nil))}
}

// compress writes to w what produce writes, compressed, and returns the digests.
func compress(w io.Writer, level int, produce func(io.Writer) error) (Digests, error) {
	packed, plain := &meter{hash: sha256.New()}, &meter{hash: sha256.New()}
	zip, err := gzip.NewWriterLevel(io.MultiWriter(w, packed), level)
	if err != nil {
		return Digests{}, err
	}
	if err := produce(io.MultiWriter(zip, plain)); err != nil {
		return Digests{}, err
	}
	if err := zip.Close(); err != nil {
		return Digests{}, err
	}
	return Digests{packed.sum(), plain.sum(), packed.n, plain.n}, nil
}

// Entry is an entry of a layer's tar.
type Entry struct {
	tar.Header
	// Data is the content of a regular file; Header.Size is taken from it.
	Data []byte
}

// Layer packs the entries, in their order, in memory.
func Layer(entries []Entry) (v1.Layer, error) {
	var b bytes.Buffer
	digests, err := compress(&b, gzip.BestSpeed, func(w io.Writer) error { return writeTar(w, entries) })
	if err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return &layer{digests, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }}, nil
}

func writeTar(w io.Writer, entries []Entry) error {
	t := tar.NewWriter(w)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Data))
		}
		h.Format = tar.FormatPAX
		if err := t.WriteHeader(&h); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
		if _, err := t.Write(e.Data); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	return t.Close()
}
