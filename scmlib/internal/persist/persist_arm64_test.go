// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import "testing"

// Every instruction that the processor has runs, over any range, and changes nothing.
func TestInstructions(t *testing.T) {
	m := testMem(t, 1<<20)
	b := m.Bytes(0, 1<<20)
	for i := range b {
		b[i] = byte(i * 7)
	}
	t.Logf("best: %s, line %d", Best(), line)
	for _, i := range []Insn{CVAC, CVAP, CVADP} {
		if i > Best() {
			continue
		}
		for _, n := range []uintptr{1, 63, 64, 65, 4096, 1 << 16} {
			for _, at := range []uint64{0, 1, 63, 64, 4095} {
				flush(i, m.At(at), n)
				persistLines(i, m.At(at), n)
			}
		}
	}
	for i := range b {
		if b[i] != byte(i*7) {
			t.Fatalf("byte %d changed", i)
		}
	}
}
