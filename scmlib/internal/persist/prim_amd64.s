// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func sfence()
TEXT ·sfence(SB), NOSPLIT|NOFRAME, $0-0
	SFENCE
	RET

// A flush of n > 0 bytes at p: every line that [p, p+n) touches.
#define FLUSHER(NAME, INSN, FENCE) \
TEXT NAME(SB), NOSPLIT|NOFRAME, $0-16 \
	MOVQ p+0(FP), AX  \
	MOVQ n+8(FP), CX  \
	ADDQ AX, CX       \
	ANDQ $~63, AX     \
loop:                 \
	INSN (AX)         \
	ADDQ $64, AX      \
	CMPQ AX, CX       \
	JB   loop         \
	FENCE             \
	RET

#define NOTHING

FLUSHER(·flushCLWB, CLWB, NOTHING)
FLUSHER(·flushCLFLUSHOPT, CLFLUSHOPT, NOTHING)
FLUSHER(·flushCLFLUSH, CLFLUSH, NOTHING)
FLUSHER(·persistCLWB, CLWB, SFENCE)
FLUSHER(·persistCLFLUSHOPT, CLFLUSHOPT, SFENCE)
FLUSHER(·persistCLFLUSH, CLFLUSH, SFENCE)

// func ntcopy(dst, src unsafe.Pointer, n uintptr)
// dst is aligned to 16, n a multiple of 8. SSE2 is as fast as AVX-512 here from 64 KiB on, and runs under valgrind.
TEXT ·ntcopy(SB), NOSPLIT|NOFRAME, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	CMPQ CX, $64
	JB   words
lines:
	MOVOU (SI), X0
	MOVOU 16(SI), X1
	MOVOU 32(SI), X2
	MOVOU 48(SI), X3
	MOVNTO X0, (DI)
	MOVNTO X1, 16(DI)
	MOVNTO X2, 32(DI)
	MOVNTO X3, 48(DI)
	ADDQ $64, SI
	ADDQ $64, DI
	SUBQ $64, CX
	CMPQ CX, $64
	JAE  lines
words:
	TESTQ CX, CX
	JZ   done
	MOVQ (SI), AX
	MOVNTIQ AX, (DI)
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX
	JMP  words
done:
	RET

// func cpuid(leaf, sub uint32) (a, b, c, d uint32)
TEXT ·cpuid(SB), NOSPLIT|NOFRAME, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, a+8(FP)
	MOVL BX, b+12(FP)
	MOVL CX, c+16(FP)
	MOVL DX, d+20(FP)
	RET

// func bareStorePersist(p unsafe.Pointer, rounds, lines uintptr)
// The yardstick of the benchmark: store, CLWB, SFENCE, walking over lines cache lines, with no Go in the loop.
TEXT ·bareStorePersist(SB), NOSPLIT|NOFRAME, $0-24
	MOVQ p+0(FP), DI
	MOVQ rounds+8(FP), CX
	MOVQ lines+16(FP), R8
	XORQ R9, R9
	MOVQ DI, AX
next:
	MOVQ CX, (AX)
	CLWB (AX)
	SFENCE
	ADDQ $64, AX
	INCQ R9
	CMPQ R9, R8
	JB   same
	XORQ R9, R9
	MOVQ DI, AX
same:
	DECQ CX
	JNZ  next
	RET
