/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Between tx.c and txapi.c. */
#ifndef SCM_TX_H
#define SCM_TX_H

#include "internal.h"

int scmi_tx_span(scm_tx *t, uint64_t off, uint64_t n); /* to be flushed at the commit */
int scmi_tx_finish(scm_tx *t);                         /* after scmi_tx_settle_ops */
int scmi_tx_rollback(scm_tx *t);

/* room.c */
int scmi_tx_segment(scm_tx *t, bool commit, uint32_t *chunk);
void scmi_tx_drop_ext(scm_tx *t);
void scmi_tx_end_borrow(scm_tx *t);
int scmi_tx_merge_ops(scm_tx *t, size_t *count);

#endif
