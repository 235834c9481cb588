// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// The footer begins where the EROFS image ends: the identity as JSON, zeros up to a multiple of 16, the index, the
// trailer. All numbers are little endian.
const (
	// volumeName tells packs from other images, and its last digit the version of what we expect of one.
	volumeName = "nhybrid-pack-2"

	footerMagic   = "nhybpack"
	footerVersion = 1
	indexEntry    = 16
	trailerSize   = 80
	trailerSum    = 44 // offset of the CRC-32C of the trailer up to here
	trailerSHA    = 48 // offset of the SHA-256; what stands before it is hashed
	identityMax   = 1 << 16
	holeBit       = 1 << 63
	// metaMax is the largest metadata, in bytes: readers hold it in memory.
	metaMax = 1 << 31
)

var sumTable = crc32.MakeTable(crc32.Castagnoli)

// Sum continues a CRC-32C of a data file; that of no bytes is 0.
func Sum(crc uint32, p []byte) uint32 { return crc32.Update(crc, sumTable, p) }

// Identity says which layer a pack holds.
type Identity struct {
	Layer uint64 `json:"layer"`
	// Blob and DiffID are the digests of the layer's blob and of its tar; both are empty for layers that were stored
	// by path.
	Blob         digest.Digest `json:"blob,omitempty"`
	DiffID       digest.Digest `json:"diffID,omitempty"`
	Compressed   int64         `json:"compressed,omitempty"`   // bytes of the blob
	Uncompressed int64         `json:"uncompressed,omitempty"` // bytes of the tar
	// What the layer holds is counted by [Writer.Finish].
	Files     int64 `json:"files"`     // regular files with bytes of their own
	Entries   int64 `json:"entries"`   // names, with the root and with whiteouts
	DataBytes int64 `json:"dataBytes"` // of those files
}

// Extent is the place of a data file in a pack.
type Extent struct {
	Block uint32 // first block
	Sum   uint32 // CRC-32C of the bytes
	Size  int64  // bytes, more than 0
	Hole  bool   // the file was a hole when the pack was written
}

// Offset is where the file begins in the pack, in bytes.
func (e Extent) Offset() int64 { return int64(e.Block) * BlockSize }

// End is the first block behind the file.
func (e Extent) End() uint64 { return uint64(e.Block) + (uint64(e.Size)+BlockSize-1)/BlockSize }

func appendExtent(b []byte, e Extent) []byte {
	size := uint64(e.Size)
	if e.Hole {
		size |= holeBit
	}
	b = binary.LittleEndian.AppendUint32(b, e.Block)
	b = binary.LittleEndian.AppendUint32(b, e.Sum)
	return binary.LittleEndian.AppendUint64(b, size)
}

func parseExtent(b []byte) Extent {
	size := binary.LittleEndian.Uint64(b[8:])
	return Extent{Block: binary.LittleEndian.Uint32(b), Sum: binary.LittleEndian.Uint32(b[4:]), Size: int64(size &^ holeBit), Hole: size&holeBit != 0}
}

// Index has the extents of a layer's data files by their numbers. It may be read by several goroutines.
type Index struct{ raw []byte }

// Len is the highest number.
func (x Index) Len() uint32 { return uint32(len(x.raw) / indexEntry) }

// At returns the extent of file n. It is false where n is not used: the layer itself has replaced the file, or n is 0
// or above [Index.Len].
func (x Index) At(n uint32) (Extent, bool) {
	if n == 0 || n > x.Len() {
		return Extent{}, false
	}
	e := parseExtent(x.raw[int(n-1)*indexEntry:])
	return e, e.Size > 0
}

// check refuses extents that are out of order, overlap, or reach beyond the block at which the metadata begins.
func (x Index) check(meta uint32) error {
	next := uint64(1)
	for n := uint32(1); n <= x.Len(); n++ {
		e, ok := x.At(n)
		if !ok {
			continue
		}
		if uint64(e.Block) < next || e.End() > uint64(meta) {
			return fmt.Errorf("file %d stands at block %d with %d bytes, outside of blocks %d to %d", n, e.Block, e.Size, next, meta)
		}
		next = e.End()
	}
	return nil
}

// trailer is the end of a pack.
type trailer struct {
	meta     uint64 // offset of the metadata in bytes
	footer   uint64 // offset of the footer in bytes
	identity uint32 // bytes of JSON
	numbers  uint32 // entries of the index
	indexSum uint32 // CRC-32C of the index
	idSum    uint32 // CRC-32C of the JSON
	sha      [sha256.Size]byte
}

// append writes the trailer but for its SHA-256.
func (t *trailer) append(b []byte) []byte {
	begin := len(b)
	le := binary.LittleEndian
	b = append(b, footerMagic...)
	b = le.AppendUint32(b, footerVersion)
	b = le.AppendUint32(b, t.identity)
	b = le.AppendUint64(b, t.meta)
	b = le.AppendUint64(b, t.footer)
	b = le.AppendUint32(b, t.numbers)
	b = le.AppendUint32(b, t.indexSum)
	b = le.AppendUint32(b, t.idSum)
	return le.AppendUint32(b, Sum(0, b[begin:]))
}

// readTrailer reads the trailer of a pack of size bytes. Errors are those of [Open].
func readTrailer(f io.ReaderAt, size int64) (t trailer, err error) {
	if size < BlockSize+trailerSize {
		return t, fmt.Errorf("pack is cut off after %d bytes: %w", size, errdefs.ErrDataLoss)
	}
	b := make([]byte, trailerSize)
	if _, err := f.ReadAt(b, size-trailerSize); err != nil {
		return t, fmt.Errorf("read trailer of pack: %w", err)
	}
	le := binary.LittleEndian
	if string(b[:8]) != footerMagic || le.Uint32(b[trailerSum:]) != Sum(0, b[:trailerSum]) {
		return t, fmt.Errorf("pack has no trailer, it is cut off or damaged: %w", errdefs.ErrDataLoss)
	}
	if v := le.Uint32(b[8:]); v != footerVersion {
		return t, fmt.Errorf("pack has footer version %d, this program reads version %d: %w", v, footerVersion, errdefs.ErrFailedPrecondition)
	}
	t = trailer{
		identity: le.Uint32(b[12:]), meta: le.Uint64(b[16:]), footer: le.Uint64(b[24:]),
		numbers: le.Uint32(b[32:]), indexSum: le.Uint32(b[36:]), idSum: le.Uint32(b[40:]), sha: [sha256.Size]byte(b[trailerSHA:]),
	}
	if t.identity > identityMax || t.meta%BlockSize != 0 || t.footer%BlockSize != 0 || t.meta < BlockSize || t.meta >= t.footer ||
		t.footer > uint64(size) || t.footer-t.meta > metaMax || uint64(t.index())+uint64(t.numbers)*indexEntry+trailerSize != uint64(size) {
		return t, fmt.Errorf("pack of %d bytes has a trailer for another size: %w", size, errdefs.ErrDataLoss)
	}
	return t, nil
}

// index is the offset of the index.
func (t *trailer) index() int64 {
	return erofs.Align(int64(t.footer)+int64(t.identity), indexEntry)
}

// appendFooter appends a footer but for its SHA-256. Of t it takes the offsets.
func appendFooter(b []byte, t trailer, id Identity, index []byte) ([]byte, error) {
	text, err := json.Marshal(id)
	if err != nil {
		return nil, fmt.Errorf("encode identity of layer %d: %w", id.Layer, err)
	}
	if len(text) > identityMax {
		return nil, fmt.Errorf("identity of layer %d has %d bytes, the limit is %d: %w", id.Layer, len(text), identityMax, errdefs.ErrInvalidArgument)
	}
	begin := len(b)
	b = append(slices.Grow(b, len(text)+indexEntry+len(index)+trailerSize), text...)
	for (len(b)-begin)%indexEntry != 0 {
		b = append(b, 0)
	}
	b = append(b, index...)
	t.identity, t.idSum = uint32(len(text)), Sum(0, text)
	t.numbers, t.indexSum = uint32(len(index)/indexEntry), Sum(0, index)
	return t.append(b), nil
}
