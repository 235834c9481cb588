// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

//go:noescape
func flushCVAC(p unsafe.Pointer, n, line uintptr)

//go:noescape
func flushCVAP(p unsafe.Pointer, n, line uintptr)

//go:noescape
func flushCVADP(p unsafe.Pointer, n, line uintptr)

//go:noescape
func dsb()

//go:noescape
func ctr() uint64

// LineSize is the unit that the format and the tests reckon with. The processor's own may be smaller; see line.
const LineSize = 64

const haveNT = false

// line is the smallest data cache line of the system: CTR_EL0.DminLine is the log2 of its length in 4-byte words.
var line = uintptr(4) << (ctr() >> 16 & 15)

// detect asks the auxiliary vector: HWCAP_DCPOP (bit 16), HWCAP2_DCPODP (bit 0); Linux arch/arm64/include/uapi/asm/hwcap.h.
func detect(no func(Insn) bool) Insn {
	const atHWCAP, atHWCAP2 = 16, 26
	var cap1, cap2 uintptr
	aux, err := unix.Auxv()
	if err != nil {
		return CVAC
	}
	for _, a := range aux {
		switch a[0] {
		case atHWCAP:
			cap1 = a[1]
		case atHWCAP2:
			cap2 = a[1]
		}
	}
	switch {
	case cap2&1 != 0 && !no(CVADP):
		return CVADP
	case cap1>>16&1 != 0 && !no(CVAP):
		return CVAP
	}
	return CVAC
}

func flush(i Insn, p unsafe.Pointer, n uintptr) {
	switch i {
	case CVADP:
		flushCVADP(p, n, line)
	case CVAP:
		flushCVAP(p, n, line)
	case CVAC:
		flushCVAC(p, n, line)
	}
}

func persistLines(i Insn, p unsafe.Pointer, n uintptr) {
	flush(i, p, n)
	dsb()
}

func fence() { dsb() }

func ntcopy(dst, src unsafe.Pointer, n uintptr) {
	copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
}
