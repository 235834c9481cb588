// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

const (
	bufferSize = 1 << 20
	flushedMin = 4 << 20 // bytes between two calls of WriterOptions.Flushed
	blocksMax  = 1<<32 - 1
)

// WriterOptions are the options of [Create].
type WriterOptions struct {
	// Flushed, if not nil, is called after each piece of about 4 MiB has been written to the page cache, and for the
	// rest by Finish, so that the caller can start its write-back. The range may include holes.
	Flushed func(f *os.File, off, n int64)
}

// Stats says what [Writer.Finish] wrote.
type Stats struct {
	Size      int64 // bytes of the pack, holes included
	MetaBytes int64 // of the EROFS metadata
	Files     int64 // regular files with bytes of their own, inline or in a data file that has an inode
	DataBytes int64 // of these files
	HoleBytes int64 // of those, what was left as holes
	Entries   int64 // names, with the root and with whiteouts
	Inodes    int64
}

// Writer writes a pack front to back and reads nothing back. It never syncs. The first error of writing stays: all
// later calls return it. It is for one goroutine at a time.
type Writer struct {
	f     *os.File
	opts  WriterOptions
	buf   []byte
	pos   int64 // where the first byte of buf belongs
	told  int64 // Flushed knows the range before
	fresh int64 // bytes written behind told
	sha   hash.Hash
	index []byte
	err   error

	open bool // a file was begun
	hole bool // it stays a hole
	cur  Extent
	left int64 // bytes that it lacks
}

// Create makes a pack at path with mode 0600. A file that is there is truncated; a symlink is not followed.
func Create(path string, opts WriterOptions) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create pack: %w", err)
	}
	return &Writer{f: f, opts: opts, pos: BlockSize, told: BlockSize, buf: make([]byte, 0, bufferSize)}, nil
}

// Begin begins the next data file and returns its number and its first block. Exactly size bytes, which is more than
// 0, follow by Write, or one Hole; then End. A file that EROFS has no room for is errdefs.ErrInvalidArgument.
func (w *Writer) Begin(size int64) (number, block uint32, err error) {
	switch {
	case w.err != nil:
		return 0, 0, w.err
	case w.open || w.sha != nil:
		return 0, 0, w.errorf("begin a file before the end of another or after the last: %w", errdefs.ErrFailedPrecondition)
	case size <= 0:
		return 0, 0, w.errorf("begin a file of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	first := (w.pos + int64(len(w.buf))) / BlockSize
	w.cur = Extent{Block: uint32(first), Size: size}
	if w.cur.End() >= blocksMax {
		return 0, 0, w.errorf("place a file of %d bytes at block %d, the limit is 2^32 blocks: %w", size, first, errdefs.ErrInvalidArgument)
	}
	w.open, w.hole, w.left = true, false, size
	return uint32(len(w.index)/indexEntry) + 1, w.cur.Block, nil
}

// Write appends bytes of the file that was begun.
func (w *Writer) Write(p []byte) (int, error) {
	switch {
	case w.err != nil:
		return 0, w.err
	case !w.open || w.hole || int64(len(p)) > w.left:
		return 0, w.errorf("write %d bytes where %d are expected: %w", len(p), w.left, errdefs.ErrFailedPrecondition)
	}
	w.cur.Sum = Sum(w.cur.Sum, p)
	w.left -= int64(len(p))
	return len(p), w.put(p)
}

// Hole leaves the file that was begun as a hole of its size: its bytes went elsewhere. sum is their [Sum].
func (w *Writer) Hole(sum uint32) error {
	switch {
	case w.err != nil:
		return w.err
	case !w.open || w.hole || w.left != w.cur.Size:
		return w.errorf("leave a hole in a file that has bytes or was not begun: %w", errdefs.ErrFailedPrecondition)
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.pos += w.cur.Size
	w.cur.Sum, w.cur.Hole, w.hole, w.left = sum, true, true, 0
	return nil
}

// End ends the file that was begun and returns its [Sum]. It is an error of class errdefs.ErrFailedPrecondition if
// bytes are missing.
func (w *Writer) End() (sum uint32, err error) {
	switch {
	case w.err != nil:
		return 0, w.err
	case !w.open || w.left > 0:
		return 0, w.errorf("end a file that lacks %d bytes: %w", w.left, errdefs.ErrFailedPrecondition)
	}
	w.open = false
	w.index = appendExtent(w.index, w.cur)
	return w.cur.Sum, w.pad()
}

// pad goes on to the next block. Behind a hole it leaves another one.
func (w *Writer) pad() error {
	n := erofs.Align(w.pos+int64(len(w.buf)), BlockSize) - w.pos - int64(len(w.buf))
	if len(w.buf) == 0 {
		w.pos += n
		return nil
	}
	return w.put(zeros[:n])
}

var zeros [BlockSize]byte

// put appends bytes at the end.
func (w *Writer) put(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), cap(w.buf)-len(w.buf))
		w.buf, p = append(w.buf, p[:n]...), p[n:]
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush hands the buffer on to the file.
func (w *Writer) flush() error {
	if w.err != nil || len(w.buf) == 0 {
		return w.err
	}
	if _, err := w.f.WriteAt(w.buf, w.pos); err != nil {
		w.err = w.errorf("write: %w", err)
		return w.err
	}
	w.pos += int64(len(w.buf))
	w.fresh += int64(len(w.buf))
	w.buf = w.buf[:0]
	if w.fresh >= flushedMin {
		w.tell()
	}
	return nil
}

func (w *Writer) tell() {
	if w.opts.Flushed != nil && w.fresh > 0 {
		w.opts.Flushed(w.f, w.told, w.pos-w.told)
	}
	w.told, w.fresh = w.pos, 0
}

// Finish writes metadata and footer, and the superblock last; it does not sync, and the file stays open. It sets
// m.Numbers, and Block and Sum of the inodes whose data are in this pack; their Data and Size must be those that were
// begun. Numbers that no inode has are not used afterwards. The counts in id are set from m. The same calls give the
// same bytes. What EROFS or a pack cannot hold is errdefs.ErrInvalidArgument, and the error names the path.
func (w *Writer) Finish(m *Meta, id Identity) (Stats, error) {
	switch {
	case w.err != nil:
		return Stats{}, w.err
	case w.open:
		return Stats{}, w.errorf("finish before the end of a file: %w", errdefs.ErrFailedPrecondition)
	case w.sha != nil:
		return Stats{}, w.errorf("finish twice: %w", errdefs.ErrFailedPrecondition)
	case m.Layer != id.Layer:
		return Stats{}, w.errorf("finish layer %d as layer %d: %w", m.Layer, id.Layer, errdefs.ErrInvalidArgument)
	}
	if err := w.flush(); err != nil {
		return Stats{}, err
	}
	meta := newMetaWriter(m, w.index, uint32(w.pos/BlockSize))
	if err := meta.plan(); err != nil {
		return Stats{}, w.errorf("%w", err)
	}
	m.Numbers = Index{w.index}.Len()
	id.Files, id.Entries, id.DataBytes = meta.stats.Files, meta.stats.Entries, meta.stats.DataBytes
	block, err := meta.super(id)
	if err != nil {
		return Stats{}, err
	}
	w.sha = sha256.New()
	w.sha.Write(block)
	t := trailer{meta: uint64(w.pos)}
	if err := meta.write(metaSink{w}); err != nil {
		return Stats{}, w.errorf("%w", err)
	}
	if err := w.flush(); err != nil {
		return Stats{}, err
	}
	t.footer = uint64(w.pos)
	footer, err := appendFooter(nil, t, id, w.index)
	if err != nil {
		return Stats{}, err
	}
	w.sha.Write(footer)
	if err := errors.Join(w.put(w.sha.Sum(footer)), w.flush()); err != nil {
		return Stats{}, err
	}
	if _, err := w.f.WriteAt(block, 0); err != nil {
		w.err = w.errorf("write superblock: %w", err)
		return Stats{}, w.err
	}
	w.tell()
	meta.stats.Size, meta.stats.MetaBytes = w.pos, int64(t.footer-t.meta)
	return meta.stats, nil
}

// metaSink hashes the metadata on its way into the file.
type metaSink struct{ w *Writer }

func (s metaSink) Write(p []byte) (int, error) {
	s.w.sha.Write(p)
	return len(p), s.w.put(p)
}

func (w *Writer) errorf(format string, args ...any) error {
	return fmt.Errorf("pack %q: %w", w.f.Name(), fmt.Errorf(format, args...))
}

// File is the file of the pack.
func (w *Writer) File() *os.File { return w.f }

// Close closes the file and leaves it where it is.
func (w *Writer) Close() error { return w.f.Close() }

// Abort closes the file and unlinks it.
func (w *Writer) Abort() error {
	err := os.Remove(w.f.Name())
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, w.f.Close())
}
