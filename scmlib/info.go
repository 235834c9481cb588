// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// Granularity is the unit in which stores reach the medium, and so what Persist costs. A smaller value is finer.
type Granularity uint8

// AnyGranularity asks for nothing. Byte: stores in the caches are safe (eADR), Persist is a fence. CacheLine: Persist flushes lines.
// Page: Persist calls msync.
const (
	AnyGranularity Granularity = iota
	Byte
	CacheLine
	Page
)

func (g Granularity) String() string {
	return name(int(g), "any", "byte", "cache line", "page")
}

// Durability is what survives once Persist or Update returned nil. A greater value is more.
type Durability uint8

// AnyDurability asks for nothing. Volatile: nothing survives. ProcessCrash: the end of the process and of the container.
// PowerLoss: a crash of the system and loss of power, too.
const (
	AnyDurability Durability = iota
	Volatile
	ProcessCrash
	PowerLoss
)

func (d Durability) String() string {
	return name(int(d), "any", "volatile", "process crash", "power loss")
}

// Mode is the paper's word for where a region lies.
type Mode uint8

// Auto takes the best that the file gives. Mapping insists on loads and stores (cache line or byte). Volume and Storage use a file and msync, the one on a
// volume, the other in the container's own file system. DRAM is anonymous memory.
const (
	Auto Mode = iota
	Mapping
	Volume
	Storage
	DRAM
)

func (m Mode) String() string {
	return name(int(m), "auto", "mapping", "volume", "storage", "dram")
}

func name(i int, names ...string) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown (%d)", i)
}

// Info says what a region is.
type Info struct {
	Path        string
	Mode        Mode
	Size        uint64
	Granularity Granularity
	Durability  Durability
	Why         string // how the two were found
	Filesystem  string // type, such as ext4
	Mount       string // "source on mount point (options)"
	DAX         bool   // statx says so
	MapSync     bool   // MAP_SYNC was accepted
	EADR        bool   // every persistence domain holds the caches
	Forced      bool   // the environment overrode what was found
	Instruction string // that writes lines back
	Layout      string
	UUID        string
	Parent      string // uuid of the region this one was copied from
	Generation  uint64 // opens for writing
	Recovered   int    // transactions that this open rolled back
	Healed      bool   // this open wrote a bad copy of the header again
	Lanes       int    // transactions at a time
	ReadOnly    bool
}

// Info is what was found at open.
func (r *Region) Info() Info { return r.info }

// Granularity is Info().Granularity.
func (r *Region) Granularity() Granularity { return r.info.Granularity }

// Durability is Info().Durability.
func (r *Region) Durability() Durability { return r.info.Durability }

func (r *Region) fillInfo() {
	i := &r.info
	i.Size, i.Layout, i.Generation, i.Lanes, i.ReadOnly = r.size, r.hdr.layout, r.hdr.generation, int(r.lanes), r.readOnly
	i.UUID = uuidString(r.hdr.uuid)
	if r.hdr.parent != [16]byte{} {
		i.Parent = uuidString(r.hdr.parent)
	}
	if i.Instruction == "" {
		i.Instruction = persist.Best().String()
	}
}

func uuidString(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Free is the number of bytes in chunks that nothing uses, without what is kept for the log of commits. Blocks in runs that are not full come on top.
func (r *Region) Free() uint64 {
	r.heap.mu.Lock()
	defer r.heap.mu.Unlock()
	kept := min(r.heap.free, r.heap.keep(0))
	return uint64(r.heap.free-kept) * uint64(r.chunkSize)
}
