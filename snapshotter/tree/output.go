// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// blockWriter collects what is written and completes the superblock, whose checksum covers the rest of its block.
type blockWriter struct {
	w   io.Writer
	buf []byte
	pos int64
	err error
}

func (b *blockWriter) write(p []byte) {
	b.buf = append(b.buf, p...)
	b.pos += int64(len(p))
	if len(b.buf) >= 1<<20 {
		b.flush()
	}
}

// pad writes zeros up to pos.
func (b *blockWriter) pad(pos int64) {
	for b.err == nil && b.pos < pos {
		b.write(zeros[:min(pos-b.pos, int64(len(zeros)))])
	}
	if b.err == nil && b.pos > pos {
		b.err = fmt.Errorf("write tree: at %d, past %d: %w", b.pos, pos, errdefs.ErrInternal)
	}
}

var zeros [blockSize]byte

func (b *blockWriter) flush() error {
	if b.err != nil {
		return b.err
	}
	if b.pos == int64(len(b.buf)) && len(b.buf) >= blockSize {
		binary.LittleEndian.PutUint32(b.buf[superOffset+4:], superChecksum(b.buf))
	}
	if _, err := b.w.Write(b.buf); err != nil {
		b.err = fmt.Errorf("write tree: %w", err)
	}
	b.buf = b.buf[:0]
	return b.err
}
