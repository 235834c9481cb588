// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package stream is the form in which a region travels: its used extents, with checksums. docs/regions.md holds the format. What is read
// may come from anyone: every length is bounded and checked before it is used, and memory is bounded by [MaxExtent].
package stream

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"time"

	"github.com/containerd/errdefs"
)

const (
	magic     = "SCMIMG1\n"
	maxHeader = 64 << 10
	end       = math.MaxUint64

	// MaxExtent is the most bytes that an extent holds.
	MaxExtent = 1 << 20
	// MinSize, MaxSize and Unit bound what a region may have: they are those of scmlib.
	MinSize = 64 << 10
	MaxSize = 1 << 46
	Unit    = 4096
)

// ErrDamaged is a stream that is not what was written, or was not written by [Encode]. It is an errdefs.ErrDataLoss.
var ErrDamaged = fmt.Errorf("stream of a region is damaged: %w", errdefs.ErrDataLoss)

// ErrVersion is a stream of another format. It is an errdefs.ErrNotImplemented.
var ErrVersion = fmt.Errorf("stream of a region is of another version: %w", errdefs.ErrNotImplemented)

func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, a...))
}

// Header describes the region.
type Header struct {
	Size    int64     `json:"size"` // of the whole region, in bytes
	Name    string    `json:"name,omitempty"`
	Created time.Time `json:"created"`
}

// CheckSize tells whether a region may have this size.
func CheckSize(size int64) error {
	if size < MinSize || size > MaxSize || size%Unit != 0 {
		return fmt.Errorf("size %d: a region has %d to %d bytes and a multiple of %d: %w", size, MinSize, int64(MaxSize), Unit, errdefs.ErrInvalidArgument)
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Stats counts what a stream holds.
type Stats struct {
	Extents int64 `json:"extents"`
	Used    int64 `json:"used_bytes"`   // of the region
	Stream  int64 `json:"stream_bytes"` // of the stream
}

// Encoder writes a stream.
type Encoder struct {
	w     io.Writer
	sum   hash.Hash
	size  uint64
	next  uint64
	stats Stats
	err   error
}

// NewEncoder writes the header.
func NewEncoder(w io.Writer, h Header) (*Encoder, error) {
	if err := CheckSize(h.Size); err != nil {
		return nil, err
	}
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode header: %w", err)
	}
	if len(b) > maxHeader {
		return nil, fmt.Errorf("header of %d bytes: at most %d: %w", len(b), maxHeader, errdefs.ErrInvalidArgument)
	}
	e := &Encoder{w: w, sum: sha256.New(), size: uint64(h.Size)}
	head := binary.LittleEndian.AppendUint32(nil, uint32(len(b)))
	head = append(head, b...)
	head = binary.LittleEndian.AppendUint32(head, crc32.Checksum(head, castagnoli))
	e.put([]byte(magic))
	e.put(head)
	return e, e.err
}

func (e *Encoder) put(b []byte) {
	if e.err != nil {
		return
	}
	e.sum.Write(b)
	if _, e.err = e.w.Write(b); e.err == nil {
		e.stats.Stream += int64(len(b))
	}
}

// Write adds data at an offset behind all that was added before. It is cut into extents of at most [MaxExtent] bytes.
func (e *Encoder) Write(off int64, data []byte) error {
	for len(data) > 0 && e.err == nil {
		n := min(len(data), MaxExtent)
		if uint64(off) < e.next || uint64(off)+uint64(n) > e.size {
			return fmt.Errorf("extent of %d bytes at %d: %w", n, off, errdefs.ErrOutOfRange)
		}
		e.put(frame(uint64(off), data[:n]))
		e.put(data[:n])
		e.next = uint64(off) + uint64(n)
		e.stats.Extents++
		e.stats.Used += int64(n)
		off, data = off+int64(n), data[n:]
	}
	return e.err
}

func frame(off uint64, data []byte) []byte {
	b := binary.LittleEndian.AppendUint64(nil, off)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return binary.LittleEndian.AppendUint32(b, crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, data))
}

// Close writes the end. It does not close the writer.
func (e *Encoder) Close() (Stats, error) {
	e.put(frame(end, nil))
	if e.err == nil {
		var n int
		n, e.err = e.w.Write(e.sum.Sum(nil))
		e.stats.Stream += int64(n)
	}
	return e.stats, e.err
}

// Decoder reads a stream.
type Decoder struct {
	r      io.Reader // of bytes that are summed
	raw    io.Reader
	sum    hash.Hash
	header Header
	next   uint64
	buf    []byte
	stats  Stats
}

// NewDecoder reads the header. r should be buffered.
func NewDecoder(r io.Reader) (*Decoder, error) {
	d := &Decoder{raw: r, sum: sha256.New()}
	d.r = io.TeeReader(r, d.sum)
	var head [len(magic) + 4]byte
	if err := d.read(head[:]); err != nil {
		return nil, err
	}
	if string(head[:len(magic)]) != magic {
		if bytes.HasPrefix(head[:], []byte(magic[:6])) {
			return nil, fmt.Errorf("%w: it begins with %q, not %q", ErrVersion, head[:len(magic)], magic)
		}
		return nil, damaged("it does not begin with %q", magic)
	}
	n := binary.LittleEndian.Uint32(head[len(magic):])
	if n > maxHeader {
		return nil, damaged("its header has %d bytes, at most %d are allowed", n, maxHeader)
	}
	b := make([]byte, n+4)
	if err := d.read(b); err != nil {
		return nil, err
	}
	if crc32.Update(crc32.Checksum(head[len(magic):], castagnoli), castagnoli, b[:n]) != binary.LittleEndian.Uint32(b[n:]) {
		return nil, damaged("checksum of the header")
	}
	if err := json.Unmarshal(b[:n], &d.header); err != nil {
		return nil, damaged("header: %v", err)
	}
	if err := CheckSize(d.header.Size); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return d, nil
}

// Header is what the stream says of the region.
func (d *Decoder) Header() Header { return d.header }

// Stats counts what was read so far.
func (d *Decoder) Stats() Stats { return d.stats }

func (d *Decoder) read(b []byte) error {
	n, err := io.ReadFull(d.r, b)
	d.stats.Stream += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it ends after %d bytes, within a record", d.stats.Stream)
	}
	if err != nil {
		return fmt.Errorf("read stream of a region: %w", err)
	}
	return nil
}

// Next returns the next extent, good until the call that follows, and io.EOF behind the last one. Only io.EOF says that the stream is whole: what was
// returned before must not be used without it.
func (d *Decoder) Next() (off int64, data []byte, err error) {
	var f [16]byte
	if err := d.read(f[:]); err != nil {
		return 0, nil, err
	}
	at, n := binary.LittleEndian.Uint64(f[:]), binary.LittleEndian.Uint32(f[8:])
	size := uint64(d.header.Size)
	switch {
	case at == end && n == 0:
	case n == 0 || n > MaxExtent || at < d.next || at > size || uint64(n) > size-at:
		return 0, nil, damaged("an extent of %d bytes at %d, in a region of %d bytes, behind one that ends at %d", n, at, size, d.next)
	}
	if cap(d.buf) < int(n) {
		d.buf = make([]byte, n)
	}
	data = d.buf[:n]
	if err := d.read(data); err != nil {
		return 0, nil, err
	}
	if crc32.Update(crc32.Checksum(f[:12], castagnoli), castagnoli, data) != binary.LittleEndian.Uint32(f[12:]) {
		return 0, nil, damaged("checksum of the extent of %d bytes at %d", n, at)
	}
	if at == end {
		return 0, nil, d.finish()
	}
	d.next = at + uint64(n)
	d.stats.Extents++
	d.stats.Used += int64(n)
	return int64(at), data, nil
}

func (d *Decoder) finish() error {
	want := d.sum.Sum(nil)
	d.r = d.raw
	got := make([]byte, sha256.Size)
	if err := d.read(got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return damaged("SHA-256 of the whole")
	}
	var one [1]byte
	if n, err := io.ReadFull(d.r, one[:]); n != 0 {
		return damaged("there is more behind its end")
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read stream of a region: %w", err)
	}
	return io.EOF
}
