// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package persist holds the instructions that move stores from the caches to the medium, and Mem, the memory they work on.
package persist

import (
	"os"
	"strconv"
	"sync"
)

// Insn is an instruction that writes a cache line back.
type Insn uint8

// The instructions, by architecture. None means that this processor has none that is known.
const (
	None Insn = iota
	CLFLUSH
	CLFLUSHOPT
	CLWB
	CVAC
	CVAP
	CVADP
)

func (i Insn) String() string {
	return [...]string{"none", "clflush", "clflushopt", "clwb", "dc cvac", "dc cvap", "dc cvadp"}[i]
}

// Best is the cheapest instruction that this processor has and the environment allows (SCM_NO_CLWB, SCM_NO_CLFLUSHOPT, SCM_NO_CVAP).
var Best = sync.OnceValue(func() Insn {
	return detect(func(i Insn) bool {
		switch i {
		case CLWB:
			return os.Getenv("SCM_NO_CLWB") == "1"
		case CLFLUSHOPT:
			return os.Getenv("SCM_NO_CLFLUSHOPT") == "1"
		case CVAP, CVADP: // QEMU 7.2 in user mode announces both and has neither
			return os.Getenv("SCM_NO_CVAP") == "1"
		}
		return false
	})
})

// ntThreshold is the length from which a copy bypasses the cache. Cached copy and flush win below 512 bytes, MOVNTDQ above 1 KiB.
var ntThreshold = sync.OnceValue(func() uint64 {
	if !haveNT || os.Getenv("SCM_NO_MOVNT") == "1" {
		return ^uint64(0)
	}
	if n, err := strconv.ParseUint(os.Getenv("SCM_MOVNT_THRESHOLD"), 10, 63); err == nil {
		return max(n, 64)
	}
	return 1024
})
