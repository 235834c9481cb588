/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The root object that the tests' programs in C and in Go share. */
#ifndef TEST_COMMON_H
#define TEST_COMMON_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "scm.h"

struct cell {
	uint64_t v, pad[7]; /* a line of its own */
};

struct cells {
	struct cell a[12];
	scm_off block[6];
	scm_off bulk;
	uint64_t flag;
	uint64_t wide[400];
};

/* Says what failed, as Go reads it: a code, and the message. */
#define TRY(call)                                                                                         \
	do {                                                                                              \
		int try_rc = (call);                                                                      \
		if (try_rc) {                                                                             \
			printf("error %d %s\n", try_rc, scm_errormsg());                                  \
			exit(3);                                                                          \
		}                                                                                         \
	} while (0)

#define CHECK(cond)                                                                                       \
	do {                                                                                              \
		if (!(cond)) {                                                                            \
			printf("failed: %s:%d: %s (last message: %s)\n", __FILE__, __LINE__, #cond, scm_errormsg()); \
			exit(4);                                                                          \
		}                                                                                         \
	} while (0)

#endif
