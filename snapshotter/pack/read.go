// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Pack is a pack that is open for reading. Its methods may be called by several goroutines; all that return an error
// read from the disk.
type Pack struct {
	f     *os.File
	size  int64
	t     trailer
	super erofs.Super
	id    Identity
}

// Open opens the pack at path. It reads superblock, trailer and identity, checks their checksums and that they go with
// each other and with the size of the file. The error is of class errdefs.ErrDataLoss if the pack is not finished, cut
// off or damaged, errdefs.ErrFailedPrecondition if another version wrote it, errdefs.ErrInvalidArgument if it is
// something else.
func Open(path string) (*Pack, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open pack: %w", err)
	}
	p := &Pack{f: f}
	if err := p.open(); err != nil {
		f.Close()
		return nil, fmt.Errorf("open pack %q: %w", path, err)
	}
	return p, nil
}

func (p *Pack) open() error {
	fi, err := p.f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("not a regular file: %w", errdefs.ErrInvalidArgument)
	}
	p.size = fi.Size()
	block := make([]byte, BlockSize)
	n, err := p.f.ReadAt(block, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if p.super, err = erofs.ReadSuper(block[:n], p.f.Name(), "pack", volumeName); err != nil {
		_, terr := readTrailer(p.f, p.size)
		switch {
		case n == BlockSize && bytes.Equal(block, zeros[:]):
			return fmt.Errorf("the first block is empty, the pack is not finished: %w", errdefs.ErrDataLoss)
		case terr == nil && errdefs.IsInvalidArgument(err):
			return fmt.Errorf("the superblock is damaged: %w", errdefs.ErrDataLoss)
		}
		return err
	}
	if p.t, err = readTrailer(p.f, p.size); err != nil {
		return err
	}
	if uint64(p.super.Blocks)*BlockSize != p.t.footer || uint64(p.super.MetaBlock)*BlockSize != p.t.meta {
		return fmt.Errorf("superblock and trailer disagree: %w", errdefs.ErrDataLoss)
	}
	text := make([]byte, p.t.identity)
	if err := readFull(p.f, text, int64(p.t.footer)); err != nil {
		return fmt.Errorf("read identity: %w", err)
	}
	if Sum(0, text) != p.t.idSum {
		return fmt.Errorf("the identity is damaged, its checksum does not match: %w", errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(text, &p.id); err != nil {
		return fmt.Errorf("parse identity: %s: %w", err.Error(), errdefs.ErrDataLoss)
	}
	return nil
}

// readFull is ReadAt, but a file that ends before is errdefs.ErrDataLoss.
func readFull(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF):
		return fmt.Errorf("file ends at %d: %w", off+int64(n), errdefs.ErrDataLoss)
	}
	return err
}

// Identity says which layer the pack holds.
func (p *Pack) Identity() Identity { return p.id }

// Blocks is the number of blocks of the EROFS image, which is what is in front of the footer.
func (p *Pack) Blocks() uint32 { return p.super.Blocks }

// Size is the size of the file in bytes.
func (p *Pack) Size() int64 { return p.size }

// File is the file of the pack, open for reading.
func (p *Pack) File() *os.File { return p.f }

// Close closes the pack.
func (p *Pack) Close() error { return p.f.Close() }

// Index reads the index and checks it. The error is of class errdefs.ErrDataLoss if it is damaged.
func (p *Pack) Index() (Index, error) {
	x := Index{make([]byte, int(p.t.numbers)*indexEntry)}
	if err := readFull(p.f, x.raw, p.t.index()); err != nil {
		return Index{}, p.errorf("read index: %w", err)
	}
	if Sum(0, x.raw) != p.t.indexSum {
		return Index{}, p.errorf("the index is damaged, its checksum does not match: %w", errdefs.ErrDataLoss)
	}
	if err := x.check(p.super.MetaBlock); err != nil {
		return Index{}, p.errorf("the index is malformed: %w: %w", err, errdefs.ErrDataLoss)
	}
	return x, nil
}

// ReadExtent reads the extent of file n from a pack of size bytes, by two small reads. It checks the trailer and not the
// index. A number that is not used is errdefs.ErrNotFound, other errors are those of [Open].
func ReadExtent(f io.ReaderAt, size int64, n uint32) (Extent, error) {
	t, err := readTrailer(f, size)
	if err != nil {
		return Extent{}, err
	}
	var e Extent
	if n > 0 && n <= t.numbers {
		b := make([]byte, indexEntry)
		if err := readFull(f, b, t.index()+int64(n-1)*indexEntry); err != nil {
			return Extent{}, fmt.Errorf("read extent of file %d: %w", n, err)
		}
		e = parseExtent(b)
	}
	switch {
	case e.Size == 0:
		return Extent{}, fmt.Errorf("pack has no file %d: %w", n, errdefs.ErrNotFound)
	case e.Block == 0 || e.End() > t.meta/BlockSize:
		return Extent{}, fmt.Errorf("the extent of file %d is damaged: %w", n, errdefs.ErrDataLoss)
	}
	return e, nil
}

// ReadData returns a reader of the bytes of file n, and errdefs.ErrNotFound if the number is not used. Holes that are
// not filled yet read as zeros.
func (p *Pack) ReadData(n uint32) (*io.SectionReader, error) {
	e, err := ReadExtent(p.f, p.size, n)
	if err != nil {
		return nil, p.errorf("%w", err)
	}
	return io.NewSectionReader(p.f, e.Offset(), e.Size), nil
}

// Meta reads the metadata twice: it checks it by the SHA-256 over block 0, metadata and footer, and parses it. Beside
// what it returns, it needs memory of an eighth of the metadata. Anything but what a [Writer] writes is
// errdefs.ErrDataLoss.
func (p *Pack) Meta(ctx context.Context) (*Meta, error) {
	if err := p.checkSHA(ctx); err != nil {
		return nil, err
	}
	index, err := p.Index()
	if err != nil {
		return nil, err
	}
	w := window{f: p.f, base: int64(p.t.meta), size: int64(p.t.footer - p.t.meta)}
	q := &parser{dirs: w, inodes: w, blocks: w, start: p.super.MetaBlock, layer: p.id.Layer, index: index}
	m, err := q.parse(ctx, p.super.RootNid, p.super.Inos)
	if err != nil {
		var read *readError
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.As(err, &read):
			return nil, p.errorf("read metadata: %w", err)
		}
		return nil, p.errorf("the metadata is malformed: %w: %w", err, errdefs.ErrDataLoss)
	}
	return m, nil
}

// checkSHA compares the SHA-256 of the pack.
func (p *Pack) checkSHA(ctx context.Context) error {
	h := sha256.New()
	buf := make([]byte, bufferSize)
	for _, part := range []struct{ off, end int64 }{
		{0, BlockSize}, {int64(p.t.meta), int64(p.t.footer)}, {int64(p.t.footer), p.size - trailerSize + trailerSHA},
	} {
		for off := part.off; off < part.end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := buf[:min(part.end-off, int64(len(buf)))]
			if err := readFull(p.f, b, off); err != nil {
				return p.errorf("read metadata: %w", err)
			}
			h.Write(b)
			off += int64(len(b))
		}
	}
	if [sha256.Size]byte(h.Sum(nil)) != p.t.sha {
		return p.errorf("the metadata is damaged, its checksum does not match: %w", errdefs.ErrDataLoss)
	}
	return nil
}

func (p *Pack) errorf(format string, args ...any) error {
	return fmt.Errorf("pack %q: %w", p.f.Name(), fmt.Errorf(format, args...))
}
