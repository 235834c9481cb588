// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// Writer collects what is written, front to back, and completes the superblock, whose checksum covers the rest of its
// block. The first error stays.
type Writer struct {
	W   io.Writer
	Pos int64
	Err error
	buf []byte
}

// Write appends p.
func (w *Writer) Write(p []byte) {
	w.buf = append(w.buf, p...)
	w.Pos += int64(len(p))
	if len(w.buf) >= 1<<20 {
		_ = w.Flush()
	}
}

// Pad writes zeros up to pos.
func (w *Writer) Pad(pos int64) {
	for w.Err == nil && w.Pos < pos {
		w.Write(zeros[:min(pos-w.Pos, int64(len(zeros)))])
	}
	if w.Err == nil && w.Pos > pos {
		w.Err = fmt.Errorf("write image: at %d, past %d: %w", w.Pos, pos, errdefs.ErrInternal)
	}
}

var zeros [BlockSize]byte

// Flush hands on what was collected. The first time it must be at least a block.
func (w *Writer) Flush() error {
	if w.Err != nil {
		return w.Err
	}
	if w.Pos == int64(len(w.buf)) && len(w.buf) >= BlockSize {
		SetChecksum(w.buf)
	}
	if _, err := w.W.Write(w.buf); err != nil {
		w.Err = fmt.Errorf("write image: %w", err)
	}
	w.buf = w.buf[:0]
	return w.Err
}
