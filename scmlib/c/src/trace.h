/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What the tests' programs call; see trace.c. */
#ifndef SCM_TRACE_H
#define SCM_TRACE_H

void scmi_trace_start(int fd); /* the next region in memory that is opened */
void scmi_trace_stop(void);
void scmi_trace_mark(void);           /* ends a phase */
void scmi_trace_agent(unsigned agent); /* which processor the program runs on from now on */

#endif
