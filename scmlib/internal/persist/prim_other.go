//go:build !amd64 && !arm64

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import "unsafe"

// LineSize is the unit that the format reckons with.
const LineSize = 64

const haveNT = false

// Without an instruction for it there is no cache-line granularity: Best() is None, and only page granularity is offered.
func detect(func(Insn) bool) Insn { return None }

func flush(Insn, unsafe.Pointer, uintptr)        {}
func persistLines(Insn, unsafe.Pointer, uintptr) {}
func fence()                                     {}

func ntcopy(dst, src unsafe.Pointer, n uintptr) {
	copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
}
