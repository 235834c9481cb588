// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"bytes"
	"encoding/binary"
)

// cacheEntry is a library that ldconfig found.
type cacheEntry struct {
	path string
	// hwcap is the subdirectory of glibc-hwcaps that it was found in, "" for the common case.
	hwcap string
}

// The layout of glibc's elf/dl-cache.h, version "glibc-ld.so.cache1.1", in the byte order of the machine that wrote it.
const (
	cacheMagic      = "glibc-ld.so.cache1.1"
	cacheHeader     = 48
	cacheEntrySize  = 24
	cacheExtMagic   = 0xeaa42174
	cacheExtHWCaps  = 1
	cacheHasHWCaps  = 1 << 62 // in an entry's hwcap: the low half is an index into the extension
	maxCacheEntries = 1 << 17
)

// parseLDCache reads /etc/ld.so.cache: sonames to the places of libraries, several where there are variants or
// architectures. What does not hold together is left out.
func parseLDCache(data []byte) map[string][]cacheEntry {
	// A cache in the old format comes first where ldconfig was told so; the offsets of the new one count from its own start.
	start := bytes.Index(data, []byte(cacheMagic))
	if start < 0 || len(data)-start < cacheHeader {
		return nil
	}
	data = data[start:]
	var order binary.ByteOrder = binary.LittleEndian
	const flagsBig = 3 // of the byte after the lengths, the two low bits: 2 little, 3 big, 0 unset
	if data[28]&3 == flagsBig {
		order = binary.BigEndian
	}
	n := order.Uint32(data[20:])
	if n > maxCacheEntries || uint64(n)*cacheEntrySize > uint64(len(data)-cacheHeader) {
		return nil
	}
	hwcaps := cacheHWCaps(data, order)
	found := map[string][]cacheEntry{}
	for i := range int(n) {
		e := data[cacheHeader+i*cacheEntrySize:]
		name, path := text(data, uint64(order.Uint32(e[4:]))), text(data, uint64(order.Uint32(e[8:])))
		const longest = 4096
		if name == "" || path == "" || path[0] != '/' || len(name) > longest || len(path) > longest {
			continue
		}
		entry := cacheEntry{path: path}
		if caps := order.Uint64(e[16:]); caps&cacheHasHWCaps != 0 {
			index := uint32(caps)
			if uint64(index) >= uint64(len(hwcaps)) {
				continue
			}
			entry.hwcap = hwcaps[index]
		}
		found[name] = append(found[name], entry)
	}
	return found
}

// cacheHWCaps reads the names of subdirectories that entries refer to.
func cacheHWCaps(data []byte, order binary.ByteOrder) []string {
	at := uint64(order.Uint32(data[32:]))
	if at == 0 || at+8 > uint64(len(data)) || order.Uint32(data[at:]) != cacheExtMagic {
		return nil
	}
	const sectionSize, maxSections, maxNames = 16, 64, 1024
	for i := range min(uint64(order.Uint32(data[at+4:])), maxSections) {
		s := at + 8 + i*sectionSize
		if s+sectionSize > uint64(len(data)) {
			return nil
		}
		if order.Uint32(data[s:]) != cacheExtHWCaps {
			continue
		}
		off, size := uint64(order.Uint32(data[s+8:])), uint64(order.Uint32(data[s+12:]))
		if off+size > uint64(len(data)) {
			return nil
		}
		var names []string
		for j := uint64(0); j+4 <= min(size, 4*maxNames); j += 4 {
			names = append(names, text(data, uint64(order.Uint32(data[off+j:]))))
		}
		return names
	}
	return nil
}
