// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

#define WALK(NAME, INSN) \
TEXT NAME(SB), NOSPLIT|NOFRAME, $0-16 \
	MOVQ p+0(FP), AX  \
	MOVQ n+8(FP), CX  \
loop:                 \
	INCL (AX)         \
	INSN (AX)         \
	SFENCE            \
	ADDQ $64, AX      \
	DECQ CX           \
	JNZ  loop         \
	RET

// func walkCLWB(p *int32, n int), for n lines, n > 0; likewise the others
WALK(·walkCLWB, CLWB)
WALK(·walkCLFLUSHOPT, CLFLUSHOPT)
WALK(·walkCLFLUSH, CLFLUSH)
