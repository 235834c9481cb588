// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"fmt"
	"io"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// windowSize is what a window reads at once, in bytes.
const windowSize = 128 << 10

// window reads a part of a file, mostly front to back.
type window struct {
	f    io.ReaderAt
	base int64 // offset of the part in the file
	size int64 // of the part
	off  int64 // of buf in the part
	buf  []byte
}

var errBounds = errors.New("is out of bounds")

// get returns n bytes at off of the part, which are valid until the next call.
func (w *window) get(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || off > w.size || n > w.size-off {
		return nil, errBounds
	}
	if off < w.off || off+n > w.off+int64(len(w.buf)) {
		size := int(min(max(n, windowSize), w.size-off))
		if cap(w.buf) < size {
			w.buf = make([]byte, size)
		}
		w.buf, w.off = w.buf[:size], off
		if err := readFull(w.f, w.buf, w.base+off); err != nil {
			w.buf = w.buf[:0]
			return nil, &readError{err}
		}
	}
	return w.buf[off-w.off:][:n], nil
}

// readError is an error of the disk, not of what stands there.
type readError struct{ error }

func (e *readError) Unwrap() error { return e.error }

// tail says where the bytes of an inode are that stand in the metadata, by offsets there.
type tail struct {
	blocks, blocksSize int64 // in blocks of their own
	inline, inlineSize int64 // behind the inode
}

// tail charges the budget; off is where the xattrs of the inode end.
func (p *parser) tail(raw *erofs.Inode, off int64) (t tail, err error) {
	if err := p.take(raw.Size); err != nil {
		return t, err
	}
	t = tail{blocksSize: int64(raw.Size), inline: off}
	switch raw.Layout {
	case erofs.LayoutInline:
		t.inlineSize = t.blocksSize % BlockSize
		if t.blocksSize -= t.inlineSize; t.inlineSize > 0 && off%BlockSize+t.inlineSize > BlockSize {
			return t, errors.New("has a tail that crosses a block")
		}
	case erofs.LayoutPlain:
	default:
		return t, fmt.Errorf("has the unknown layout %d", raw.Layout)
	}
	if t.blocksSize > 0 {
		t.blocks = (int64(raw.U) - int64(p.start)) * BlockSize
	}
	return t, nil
}

// eachBlock passes the blocks of a tail to use, of which one behind the inode is the last. Window w is the one in which
// the inode is.
func (p *parser) eachBlock(t *tail, w *window, use func([]byte) error) error {
	for off := int64(0); off < t.blocksSize; off += BlockSize {
		b, err := p.blocks.get(t.blocks+off, min(t.blocksSize-off, BlockSize))
		if err != nil {
			return err
		}
		if err := use(b); err != nil {
			return err
		}
	}
	if t.inlineSize == 0 {
		return nil
	}
	b, err := w.get(t.inline, t.inlineSize)
	if err != nil {
		return err
	}
	return use(b)
}
