// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the largest window of a zstd frame, as the zstd tool itself
// refuses larger ones by default (ZSTD_WINDOWLOG_LIMIT_DEFAULT).
const maxWindow = 128 << 20

var (
	gzipMagic = []byte{0x1f, 0x8b, 0x08}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// newDecoder decodes r by what it begins with, as containerd does: gzip of any
// number of members, zstd with skippable frames and so zstd:chunked, otherwise
// r is taken for a plain tar. Bytes behind the last member or frame that are
// neither are an error of the decoder.
func newDecoder(r io.Reader) (io.ReadCloser, error) {
	// gzip reads single bytes.
	br := bufio.NewReaderSize(r, chunkSize)
	head, err := br.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return gzip.NewReader(br)
	case bytes.HasPrefix(head, zstdMagic), skippableFrame(head):
		// One goroutine decodes already. More of them would take the processor
		// from other layers.
		d, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// skippableFrame reports whether head begins a zstd frame without content
// (RFC 8878, section 3.1.2).
func skippableFrame(head []byte) bool {
	return len(head) >= 8 && binary.LittleEndian.Uint32(head)&^0xf == 0x184d2a50
}
