// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

const (
	magic     = "SCMREGN1"
	byteOrder = 0x01020304
	version   = 1
	headerLen = 512

	stateClosed = 1
	stateOpen   = 2

	// Bit 0 marks the heap of an unmodified program, whose content means nothing
	// after the process ends: only scmlib/c makes and opens those.
	incompatVolatile = 1
	incompatKnown    = 0
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type header struct {
	incompat, compat uint32
	geometry
	uuid, parent  [16]byte
	layout        string
	base          uint64
	seq           uint64
	generation    uint64
	state         uint32
	hostUSC, seen uint64
	hostDev       [16]byte
}

var le = binary.LittleEndian

func (h *header) encode() []byte {
	b := make([]byte, headerLen)
	copy(b, magic)
	le.PutUint32(b[8:], byteOrder)
	le.PutUint16(b[12:], version)
	le.PutUint16(b[14:], headerLen)
	le.PutUint32(b[16:], h.incompat)
	le.PutUint32(b[20:], h.compat)
	le.PutUint64(b[24:], h.size)
	copy(b[32:48], h.uuid[:])
	copy(b[48:64], h.parent[:])
	copy(b[64:128], h.layout)
	le.PutUint64(b[128:], h.lanesOff)
	le.PutUint32(b[136:], h.lanes)
	le.PutUint32(b[140:], h.laneSize)
	le.PutUint64(b[144:], h.tableOff)
	le.PutUint64(b[152:], h.heapOff)
	le.PutUint32(b[160:], h.chunkSize)
	le.PutUint32(b[164:], h.chunkCount)
	le.PutUint64(b[168:], h.base)
	le.PutUint64(b[176:], h.seq)
	le.PutUint64(b[184:], h.generation)
	le.PutUint32(b[192:], h.state)
	le.PutUint64(b[200:], h.hostUSC)
	le.PutUint64(b[208:], h.seen)
	copy(b[216:232], h.hostDev[:])
	le.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli))
	return b
}

// decode reads one copy. The memory is read once, into b, by the caller: a hostile process must not change it between check and use.
func decode(b []byte, m *persist.Mem) (h header, err error) {
	order := le.Uint32(b[8:])
	switch {
	case !bytes.Equal(b[:8], []byte(magic)):
		return h, fmt.Errorf("%w: no region header", ErrCorrupt)
	case order == 0x04030201:
		return h, fmt.Errorf("%w: written by a big-endian machine", ErrVersion)
	case !m.Verify(le.Uint32(b[508:]) == crc32.Checksum(b[:508], castagnoli)):
		// A future version may checksum in another way: say so rather than "damaged". Both refuse.
		if v := le.Uint16(b[12:]); v != version && order == byteOrder {
			return h, fmt.Errorf("%w: version %d, this library knows %d", ErrVersion, v, version)
		}
		return h, fmt.Errorf("%w: header checksum", ErrCorrupt)
	case order != byteOrder:
		return h, fmt.Errorf("%w: byte order mark %#x", ErrCorrupt, order)
	case le.Uint16(b[12:]) != version || le.Uint16(b[14:]) != headerLen:
		return h, fmt.Errorf("%w: version %d, this library knows %d", ErrVersion, le.Uint16(b[12:]), version)
	}
	h.incompat, h.compat = le.Uint32(b[16:]), le.Uint32(b[20:])
	h.geometry = geometry{size: le.Uint64(b[24:]), lanesOff: le.Uint64(b[128:]), lanes: le.Uint32(b[136:]), laneSize: le.Uint32(b[140:]),
		tableOff: le.Uint64(b[144:]), heapOff: le.Uint64(b[152:]), chunkSize: le.Uint32(b[160:]), chunkCount: le.Uint32(b[164:])}
	copy(h.uuid[:], b[32:])
	copy(h.parent[:], b[48:])
	h.layout = string(bytes.TrimRight(b[64:128], "\x00"))
	h.base, h.seq, h.generation, h.state = le.Uint64(b[168:]), le.Uint64(b[176:]), le.Uint64(b[184:]), le.Uint32(b[192:])
	h.hostUSC, h.seen = le.Uint64(b[200:]), le.Uint64(b[208:])
	copy(h.hostDev[:], b[216:])
	switch err := h.check(); {
	case h.incompat&incompatVolatile != 0:
		return h, fmt.Errorf("%w: it is the heap of a program (libscm_preload), not data that outlive one; use another region, or make this one anew", ErrVersion)
	case h.incompat&^incompatKnown != 0:
		return h, fmt.Errorf("%w: unknown features %#x", ErrVersion, h.incompat&^incompatKnown)
	case err != nil:
		return h, fmt.Errorf("%w: %w", ErrCorrupt, err)
	case h.state != stateClosed && h.state != stateOpen:
		return h, fmt.Errorf("%w: state %d", ErrCorrupt, h.state)
	}
	return h, nil
}

// readHeader chooses the header that counts. staleA tells that it is not copy A as it stands on the medium, healed that a copy was bad.
func readHeader(m *persist.Mem) (h header, staleA, healed bool, err error) {
	var copies [2][]byte
	var hs [2]header
	var errs [2]error
	for i := range copies {
		copies[i] = bytes.Clone(m.Bytes(uint64(i)*headerSize, headerLen))
		hs[i], errs[i] = decode(copies[i], m)
	}
	switch {
	case errs[0] == nil && errs[1] == nil:
		i := 0
		if hs[1].seq > hs[0].seq {
			i = 1
		}
		return hs[i], i == 1, false, nil
	case errs[0] == nil:
		return hs[0], false, true, nil
	case errs[1] == nil:
		return hs[1], true, true, nil
	}
	// The more telling of the two: "other version" says more than "damaged".
	if errs[0].Error() == errs[1].Error() {
		return h, false, false, fmt.Errorf("both copies of the header: %w", errs[0])
	}
	return h, false, false, fmt.Errorf("both copies of the header are bad: %w; %w", errs[0], errs[1])
}

// writeHeader writes copy B, then copy A: at any moment one of them is whole on the medium.
func writeHeader(m *persist.Mem, h *header) error {
	h.seq++
	b := h.encode()
	m.Copy(headerSize, b)
	m.Flush(headerSize, headerLen)
	if err := m.Fence(); err != nil {
		return err
	}
	m.Copy(0, b)
	m.Flush(0, headerLen)
	return m.Fence()
}

// healHeader writes copy A again from the good copy B. It must come before writeHeader, which overwrites copy B first.
func healHeader(m *persist.Mem, h *header) error {
	m.Copy(0, h.encode())
	m.Flush(0, headerLen)
	return m.Fence()
}

// blank tells whether the memory was never used: both magics zero (so a format that was cut short is blank) and all else behind the headers.
func blank(m *persist.Mem) bool {
	var zero [4096]byte
	if m.Load64(0) != 0 || m.Load64(headerSize) != 0 {
		return false
	}
	for off := uint64(rootAt); off < m.Size(); off += 4096 {
		if !bytes.Equal(m.Bytes(off, min(4096, m.Size()-off)), zero[:min(4096, m.Size()-off)]) {
			return false
		}
	}
	return true
}

// format writes the header of an empty region: copy A, its magic last and behind a fence. Cut short, the region is blank still, or has one good
// copy. The open that formats goes on to write copy B.
func format(m *persist.Mem, h *header) error {
	b := h.encode()
	m.Copy(8, b[8:])
	m.Flush(8, headerLen-8)
	if err := m.Fence(); err != nil {
		return err
	}
	m.Store64(0, le.Uint64(b))
	m.Flush(0, 8)
	return m.Fence()
}
