// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"bytes"
	"hash/crc32"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// WithHook traces what the library does to memory.
func WithHook(o Options, h persist.Hook) Options { o.hook = h; return o }

// HeadersWhole tells whether both copies of the header are good and the same.
func HeadersWhole(img []byte) bool {
	m := persist.NewMem(img, persist.FenceOnly, persist.None, nil)
	_, staleA, healed, err := readHeader(m)
	return err == nil && !staleA && !healed && bytes.Equal(img[:headerLen], img[headerSize:headerSize+headerLen])
}

// ForgeHeader sets a byte of both copies and makes their checksums right again.
func ForgeHeader(img []byte, at int, b byte) {
	for _, c := range []int{0, headerSize} {
		img[c+at] = b
		fixCRC(img[c : c+headerLen])
	}
}

// StampImage is Stamp for a region in memory.
func StampImage(img []byte, h persist.Hook, count uint64, device [16]byte) error {
	return stamp(persist.NewMem(img, persist.FenceOnly, persist.None, h), count, device)
}

// HasHeader tells whether the header that counts is that of a region of this size.
func HasHeader(img []byte) bool {
	h, _, _, err := readHeader(persist.NewMem(img, persist.FenceOnly, persist.None, nil))
	return err == nil && h.size == uint64(len(img))
}

// Rubbish fills what of the chunk table is not in use.
func Rubbish(r *Region) {
	for off := r.word(r.chunkCount); off < r.heapOff; off += 8 {
		r.mem.Store64(off, 0x5555555555555555)
	}
}

// HostUSC is the count that the region was stamped with.
func HostUSC(r *Region) uint64 { return r.hdr.hostUSC }

var (
	AdoptRegion = (*Region).adopt
	GrowRegion  = (*Region).grow
	FromEnvWith = fromEnv
	ParseSize   = parseSize
	BeginRecord = beginRecord
	AppendEntry = appendEntry
	EndRecord   = endRecord
	MemoryUnder = memoryUnder
	EADR        = eadr
	Fingerprint = fingerprint
	UUIDSalt    = func(r *Region, lane uint32) uint64 { return salt(&r.hdr.uuid, lane) }
	LaneAt      = func(r *Region, i uint32) (off, gen uint64) { return r.lane(i), r.mem.Load64(r.lane(i)) }
	WordAt      = func(r *Region, c uint32) uint64 { return r.word(c) }
	FixCRC      = fixCRC
	FreeLanes   = func(r *Region) int { return len(r.lanesFree) }
	HeapAt      = func(r *Region) uint64 { return r.heapOff }
)

// Constants of the format that tests write by hand.
const (
	OpUndo, OpSet, OpClear, OpLink = opUndo, opSet, opClear, opLink
	RootAt                         = rootAt
)

func fixCRC(b []byte) { le.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli)) }
