// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

//go:noescape
func walkCLWB(p *int32, n int)

//go:noescape
func walkCLFLUSHOPT(p *int32, n int)

//go:noescape
func walkCLFLUSH(p *int32, n int)

// barePersist increments the first word of n > 0 cache lines in a row, and flushes and fences each, by the instruction that the region uses.
func (p *region) barePersist(at *int32, n int) error {
	switch insn := p.r.Info().Instruction; insn {
	case "clwb":
		walkCLWB(at, n)
	case "clflushopt":
		walkCLFLUSHOPT(at, n)
	case "clflush":
		walkCLFLUSH(at, n)
	default:
		return fmt.Errorf("there is no sequence of instructions for %q", insn)
	}
	return nil
}
