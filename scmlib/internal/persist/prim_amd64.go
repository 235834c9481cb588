// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import "unsafe"

//go:noescape
func sfence()

//go:noescape
func flushCLWB(p unsafe.Pointer, n uintptr)

//go:noescape
func flushCLFLUSHOPT(p unsafe.Pointer, n uintptr)

//go:noescape
func flushCLFLUSH(p unsafe.Pointer, n uintptr)

//go:noescape
func persistCLWB(p unsafe.Pointer, n uintptr)

//go:noescape
func persistCLFLUSHOPT(p unsafe.Pointer, n uintptr)

//go:noescape
func persistCLFLUSH(p unsafe.Pointer, n uintptr)

//go:noescape
func ntcopy(dst, src unsafe.Pointer, n uintptr)

//go:noescape
func cpuid(leaf, sub uint32) (a, b, c, d uint32)

//go:noescape
func bareStorePersist(p unsafe.Pointer, rounds, lines uintptr)

// LineSize is the unit of a flush.
const LineSize = 64

const haveNT = true

// detect asks CPUID leaf 7: neither golang.org/x/sys/cpu nor klauspost/cpuid report these two
// (Intel SDM vol. 2A, CPUID, EBX bit 23 CLFLUSHOPT, bit 24 CLWB).
func detect(no func(Insn) bool) Insn {
	if top, _, _, _ := cpuid(0, 0); top >= 7 {
		_, b, _, _ := cpuid(7, 0)
		if b>>24&1 == 1 && !no(CLWB) {
			return CLWB
		}
		if b>>23&1 == 1 && !no(CLFLUSHOPT) {
			return CLFLUSHOPT
		}
	}
	return CLFLUSH // part of SSE2, so of every amd64
}

func flush(i Insn, p unsafe.Pointer, n uintptr) {
	switch i {
	case CLWB:
		flushCLWB(p, n)
	case CLFLUSHOPT:
		flushCLFLUSHOPT(p, n)
	case CLFLUSH:
		flushCLFLUSH(p, n)
	}
}

func persistLines(i Insn, p unsafe.Pointer, n uintptr) {
	switch i {
	case CLWB:
		persistCLWB(p, n)
	case CLFLUSHOPT:
		persistCLFLUSHOPT(p, n)
	case CLFLUSH:
		persistCLFLUSH(p, n)
	default:
		sfence()
	}
}

func fence() { sfence() }
