// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// Verify checks the SHA-256 of metadata and footer, and then reads the data of all files but those for which skip
// returns true, in the order of the pack, and compares their sums. Holes that are not filled yet do not match: skip
// them. pace is called before each piece of at most 1 MiB is read, with its size, and may wait; its error ends the
// check. Both functions may be nil. The first file that does not match is errdefs.ErrDataLoss; the error names its
// number and its path.
func (p *Pack) Verify(ctx context.Context, pace func(int) error, skip func(n uint32) bool) error {
	if err := p.checkSHA(ctx); err != nil {
		return err
	}
	index, err := p.Index()
	if err != nil {
		return err
	}
	buf := make([]byte, bufferSize)
	for n := uint32(1); n <= index.Len(); n++ {
		e, ok := index.At(n)
		if !ok || skip != nil && skip(n) {
			continue
		}
		sum := uint32(0)
		for off := int64(0); off < e.Size; {
			b := buf[:min(e.Size-off, int64(len(buf)))]
			if err := wait(ctx, pace, len(b)); err != nil {
				return err
			}
			if err := readFull(p.f, b, e.Offset()+off); err != nil {
				return p.errorf("read file %d%s: %w", n, p.named(ctx, n), err)
			}
			sum = Sum(sum, b)
			off += int64(len(b))
		}
		if sum != e.Sum {
			return p.errorf("file %d%s is damaged, its checksum is %08x and should be %08x: %w", n, p.named(ctx, n), sum, e.Sum, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// named is the path of file n for an error, or empty if the metadata cannot be read.
func (p *Pack) named(ctx context.Context, n uint32) string {
	m, err := p.Meta(ctx)
	if err != nil {
		return ""
	}
	var path string
	stack := []struct {
		path  string
		nodes []*Node
	}{{"", m.Root.Children}}
	for len(stack) > 0 && path == "" {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, c := range d.nodes {
			switch {
			case c.Inode != nil && c.Inode.Data == Ref{m.Layer, n}:
				path = fmt.Sprintf(" (%q)", d.path+"/"+c.Name)
			case len(c.Children) > 0:
				stack = append(stack, struct {
					path  string
					nodes []*Node
				}{d.path + "/" + c.Name, c.Children})
			}
		}
	}
	return path
}

func wait(ctx context.Context, pace func(int) error, n int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if pace == nil {
		return nil
	}
	return pace(n)
}

// Fill writes the bytes of a hole, from src, at its place and checks them. It does not sync. pace is called before each
// piece of at most 1 MiB is written, with its size, and may wait; its error ends the filling. It may be nil. If src is
// shorter or longer than the hole or its sum is another, the error is of class errdefs.ErrDataLoss; what was written
// until then stays. Different holes may be filled at the same time.
func Fill(ctx context.Context, pack *os.File, e Extent, src io.Reader, pace func(int) error) error {
	fail := func(what string, err error) error {
		return fmt.Errorf("fill hole at block %d of pack %q: %s: %w", e.Block, pack.Name(), what, err)
	}
	buf := make([]byte, min(e.Size, bufferSize))
	sum := uint32(0)
	for off := int64(0); off < e.Size; {
		b := buf[:min(e.Size-off, int64(len(buf)))]
		if err := wait(ctx, pace, len(b)); err != nil {
			return err
		}
		if n, err := io.ReadFull(src, b); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fail(fmt.Sprintf("source has %d bytes of %d", off+int64(n), e.Size), errdefs.ErrDataLoss)
		} else if err != nil {
			return fail("read source", err)
		}
		sum = Sum(sum, b)
		if _, err := pack.WriteAt(b, e.Offset()+off); err != nil {
			return fail("write", err)
		}
		off += int64(len(b))
	}
	if n, err := io.ReadFull(src, make([]byte, 1)); n > 0 {
		return fail(fmt.Sprintf("source has more than %d bytes", e.Size), errdefs.ErrDataLoss)
	} else if !errors.Is(err, io.EOF) {
		return fail("read source", err)
	}
	if sum != e.Sum {
		return fail(fmt.Sprintf("checksum of source is %08x and should be %08x", sum, e.Sum), errdefs.ErrDataLoss)
	}
	return nil
}

// SumOf is the [Sum] of all that r has.
func SumOf(r io.Reader) (uint32, error) {
	h := crc32.New(sumTable)
	_, err := io.Copy(h, r)
	return h.Sum32(), err
}
