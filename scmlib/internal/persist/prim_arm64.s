// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// The assembler has no DC CVAP and CVADP, so they stand as words: SYS #3, C7, Cm, #1, R0
// (Arm ARM, C5.3: DC CVAC Cm=10, DC CVAP Cm=12, DC CVADP Cm=13).
#define FLUSHER(NAME, WORDS) \
TEXT NAME(SB), NOSPLIT|NOFRAME, $0-24 \
	MOVD p+0(FP), R0     \
	MOVD n+8(FP), R1     \
	MOVD line+16(FP), R2 \
	ADD  R0, R1, R1      \
	SUB  $1, R2, R3      \
	BIC  R3, R0, R0      \
loop:                    \
	WORD $WORDS          \
	ADD  R2, R0, R0      \
	CMP  R1, R0          \
	BLO  loop            \
	RET

FLUSHER(·flushCVAC, 0xd50b7a20)
FLUSHER(·flushCVAP, 0xd50b7c20)
FLUSHER(·flushCVADP, 0xd50b7d20)

// func dsb()
TEXT ·dsb(SB), NOSPLIT|NOFRAME, $0-0
	DSB $15
	RET

// func ctr() uint64
TEXT ·ctr(SB), NOSPLIT|NOFRAME, $0-8
	MRS CTR_EL0, R0
	MOVD R0, ret+0(FP)
	RET
