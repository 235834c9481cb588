// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import "testing"

// BenchmarkBare is the yardstick of Persist: store, CLWB, SFENCE in a loop of assembly.
func BenchmarkBare(b *testing.B) {
	if Best() != CLWB {
		b.Skip("no CLWB")
	}
	m := testMem(b, 16<<20)
	b.ResetTimer()
	bareStorePersist(m.Base(), uintptr(b.N), 16<<20/64)
}

// BenchmarkPersistLine is the same through Mem.Persist.
func BenchmarkPersistLine(b *testing.B) {
	m := testMem(b, 16<<20)
	at := uint64(0)
	b.ResetTimer()
	for i := range b.N {
		*(*uint64)(m.At(at)) = uint64(i)
		if err := m.Persist(at, 8); err != nil {
			b.Fatal(err)
		}
		if at += 64; at == 16<<20 {
			at = 0
		}
	}
}

// Every instruction that this processor has leaves the bytes as they are, for any alignment and length.
func TestInstructions(t *testing.T) {
	m := testMem(t, 1<<20)
	b := m.Bytes(0, 1<<20)
	for i := range b {
		b[i] = byte(i * 7)
	}
	for _, i := range []Insn{CLFLUSH, CLFLUSHOPT, CLWB} {
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

func TestNTCopy(t *testing.T) {
	m := testMem(t, 1<<20)
	src := make([]byte, 300<<10)
	for i := range src {
		src[i] = byte(i*13 + i>>8)
	}
	for _, n := range []int{0, 1, 7, 1024, 1025, 4096 + 24, 5000, 70001, 200 << 10} {
		for _, at := range []uint64{4096, 4097, 4100, 4111} {
			for _, from := range []int{0, 3} {
				clear(m.Bytes(0, 1<<20))
				m.CopyNT(at, src[from:from+n])
				if err := m.Fence(); err != nil {
					t.Fatal(err)
				}
				got := m.Bytes(at, uint64(n))
				if string(got) != string(src[from:from+n]) {
					t.Fatalf("copy of %d bytes to %d differs", n, at)
				}
				if *(*byte)(m.At(at - 1)) != 0 || *(*byte)(m.At(at + uint64(n))) != 0 {
					t.Fatalf("copy of %d bytes to %d wrote outside", n, at)
				}
			}
		}
	}
}
