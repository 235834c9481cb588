// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"encoding/binary"
	"errors"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/nhybrid/nhybrid/placement"
)

const (
	// maxRatio is the highest ratio of compression that is believed of a whole layer when a size is known only modulo 2^32. Of the
	// known layers of Docker Hub none is above 4.5; text reaches 10.
	maxRatio = 12
	// likelyRatio is the highest ratio of compression of a large layer in the same table (4.43), rounded up.
	likelyRatio = 5
	// maxBlocks bounds the walk over a zstd blob: one small read each, of at most 128 KiB uncompressed.
	maxBlocks = 4096
)

// UncompressedSize returns the uncompressed size of a layer's blob of size bytes, without decompressing it. What the blob begins with
// counts, not the media type, which is wrong often enough. Where the size cannot be read, or is not to be believed, n is the larger of
// what was read and a cautious estimate, and exact is false.
//
//   - gzip ends in its size modulo 2³² (RFC 1952, ISIZE). Where the size may have wrapped it is not believed, nor is
//     a ratio above 12. A blob of several members (estargz, bgzip) ends in the size of the last one only, which
//     is nearly always smaller than the whole blob and so seen.
//   - zstd states the size in each frame's header, if the compressor knew it (RFC 8878, Frame_Content_Size). All frames are walked.
//   - a plain tar is its own size.
func UncompressedSize(ra content.ReaderAt, size int64, mediaType string) (n int64, exact bool) {
	head := make([]byte, min(max(size, 0), 512))
	if !readFull(ra, head, 0) {
		return placement.EstimateUncompressed(size), false
	}
	ok := false
	switch {
	case len(head) >= 18 && head[0] == 0x1f && head[1] == 0x8b:
		n, ok = gzipSize(ra, size)
	case len(head) >= 4 && isZstd(binary.LittleEndian.Uint32(head)):
		n, ok = zstdSize(ra, size)
	case len(head) == 512 && string(head[257:262]) == "ustar":
		n, ok = size, true
	case strings.HasSuffix(mediaType, ".tar") && allZero(head):
		n, ok = size, true // a tar of nothing
	}
	if !ok {
		// Of two doubtful sizes the larger one: one too small runs into a full tier.
		return max(n, placement.EstimateUncompressed(size)), false
	}
	return n, true
}

func gzipSize(ra content.ReaderAt, size int64) (int64, bool) {
	var tail [4]byte
	if !readFull(ra, tail[:], size-4) {
		return 0, false
	}
	n := int64(binary.LittleEndian.Uint32(tail[:]))
	// A tar can grow by compression, by 5 bytes a block of 64 KiB and the 18 bytes of the frame.
	// Where it is smaller than that it has wrapped, or is that of the last of several members; and of
	// a large blob the next multiple is as likely: nothing is known for certain.
	if n < size-size/4096-64 || n+1<<32 <= likelyRatio*size {
		return n, false
	}
	// A small blob is mostly tar padding, up to 10 KiB of it.
	return n, n <= maxRatio*size+16<<10
}

const (
	zstdMagic     = 0xFD2FB528
	zstdSkippable = 0x184D2A50 // to 0x184D2A5F
)

func isZstd(magic uint32) bool { return magic == zstdMagic || magic&^0xF == zstdSkippable }

// zstdSize sums up the content sizes of all frames. It steps from block to block, as no header tells how long a frame is.
func zstdSize(ra content.ReaderAt, size int64) (total int64, ok bool) {
	blocks := 0
	for off := int64(0); off < size; {
		head := make([]byte, min(18, size-off)) // longest header: magic 4, descriptor 1, window 1, dictionary 4, size 8
		if !readFull(ra, head, off) || len(head) < 8 {
			return total, false
		}
		magic := binary.LittleEndian.Uint32(head)
		if magic&^0xF == zstdSkippable {
			off += 8 + int64(binary.LittleEndian.Uint32(head[4:]))
			if blocks++; blocks > maxBlocks {
				return total, false
			}
			continue
		}
		n, length, checksum, known := zstdHeader(head)
		if magic != zstdMagic || !known || total+n < total {
			return total, false
		}
		total += n
		off += length
		for last := false; !last; {
			var b [3]byte
			if blocks++; blocks > maxBlocks || !readFull(ra, b[:], off) {
				return total, false
			}
			v := int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16
			last = v&1 != 0
			off += 3
			switch v >> 1 & 3 {
			case 0, 2: // raw, compressed
				off += v >> 3
			case 1: // one byte, repeated
				off++
			default:
				return total, false
			}
		}
		if checksum {
			off += 4
		}
		if off > size {
			return total, false
		}
	}
	return total, true
}

// zstdHeader returns the content size that a frame header states, if it does, and how long the header is.
func zstdHeader(h []byte) (n, length int64, checksum, known bool) {
	d := h[4]
	single := d&0x20 != 0
	length = 5 + []int64{0, 1, 2, 4}[d&3]
	if !single {
		length++ // window descriptor
	}
	width := []int64{0, 2, 4, 8}[d>>6]
	if width == 0 && single {
		width = 1
	}
	if width == 0 || int64(len(h)) < length+width {
		return 0, 0, false, false
	}
	var field [8]byte
	copy(field[:], h[length:length+width])
	v := binary.LittleEndian.Uint64(field[:])
	if width == 2 {
		v += 256
	}
	if v > 1<<60 {
		return 0, 0, false, false
	}
	return int64(v), length + width, d&4 != 0, true
}

func readFull(ra content.ReaderAt, p []byte, off int64) bool {
	if off < 0 {
		return false
	}
	n, err := ra.ReadAt(p, off)
	return n == len(p) && (err == nil || errors.Is(err, io.EOF))
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
