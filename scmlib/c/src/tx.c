/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The steps of a transaction: docs/scm.md, "Transaction". The functions of scm.h that call them are in txapi.c. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

#include "tx.h"

static int nomem(void) { return scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno)); }

int scmi_tx_reserve(void *array, size_t *cap, size_t need, size_t elem)
{
	if (need <= *cap)
		return 0;
	size_t n = *cap * 2 < 16 ? 16 : *cap * 2;
	while (n < need)
		n *= 2;
	void *old, *p;
	memcpy(&old, array, sizeof(old));
	if (!(p = realloc(old, n * elem)))
		return nomem();
	memcpy(array, &p, sizeof(p));
	*cap = n;
	return 0;
}

int scmi_tx_span(scm_tx *t, uint64_t off, uint64_t n)
{
	int rc = scmi_tx_reserve(&t->spans, &t->cap_spans, t->nspans + 1, sizeof(*t->spans));
	if (!rc)
		t->spans[t->nspans++] = (struct span){off, n};
	return rc;
}

/* Was the range added or allocated before, as far as the last few spans tell? */
static bool covered(const scm_tx *t, const struct span *s)
{
	for (size_t i = t->nspans, k = 0; i-- > 0 && k < 16; k++) {
		const struct span *p = &t->spans[i];
		if (s->off >= p->off && s->off + s->n <= p->off + p->n)
			return true;
	}
	return false;
}

/* Writes and flushes the record in the making. A log that has no room goes on in a chunk of the heap. That is reserved in memory only: after a
 * crash it is free, and recovery has read it before anybody can have it. Only the commit uses the tail of a segment. */
static int emit(scm_tx *t, bool commit)
{
	struct mem *m = &t->r->mem;
	if (t->end - t->pos < align_up(t->len, SCM_LINE) + SCM_LINE + (commit ? 0 : t->r->heap.room.tail)) {
		uint32_t c;
		int rc = scmi_tx_reserve(&t->ext, &t->cap_ext, t->next_ext + 1, sizeof(*t->ext));
		if (!rc)
			rc = scmi_tx_segment(t, commit, &c);
		if (rc)
			return scmi_prefix(rc, "undo log: change or free less in one transaction, or enlarge the region");
		uint64_t to = geo_chunk(&t->r->geo, c), n = t->r->geo.chunk_size;
		t->ext[t->next_ext++] = (struct alloc_op){.block = to, .chunks = 1};
		uint8_t link[SCM_LINE];
		uint32_t len = REC_HEAD + (uint32_t)scmi_entry(link + REC_HEAD, OP_LINK, to, n, NULL, 0);
		scmi_record_end(link, len, t->gen, t->seq, 1, t->salt);
		mem_copy(m, t->pos, link, len);
		mem_flush(m, t->pos, len);
		t->seq++;
		t->pos = to, t->end = to + n;
	}
	scmi_record_end(t->buf, t->len, t->gen, t->seq, t->count, t->salt);
	mem_copy(m, t->pos, t->buf, t->len);
	mem_flush(m, t->pos, t->len);
	t->pos += align_up(t->len, SCM_LINE);
	t->seq++;
	t->count = 0, t->len = REC_HEAD;
	return 0;
}

static void append(scm_tx *t, uint8_t op, uint64_t off, uint64_t arg, uint64_t payload)
{
	t->len += (uint32_t)scmi_entry(t->buf + t->len, op, off, arg, t->r->mem.base + off, payload);
	t->count++;
}

static void append_op(scm_tx *t, const struct word_op *w)
{
	if (w->op == OP_UNDO)
		append(t, OP_UNDO, w->at, 8, 8);
	else
		append(t, w->op, w->at, w->mask, 0);
}

/* Puts allocations and frees into the record in the making where that spares the commit a record and a fence, and takes no room that it needs. Others are left to
 * the commit, which has room for them in any case. */
static int log_some_ops(scm_tx *t)
{
	uint64_t most = (t->nops - t->logged) * TABLE_ENTRY;
	if (t->len + most > t->max - 32 || t->end - t->pos < align_up(REC_HEAD + most, SCM_LINE) + SCM_LINE + t->r->heap.room.tail)
		return 0;
	size_t n;
	int rc = scmi_tx_merge_ops(t, &n);
	if (rc)
		return rc;
	for (size_t i = 0; i < n; i++)
		append_op(t, &t->words[i]);
	t->logged = t->nops;
	return 0;
}

/* Makes the log durable. Only then may what it protects be changed. */
static int settle_log(scm_tx *t, bool commit)
{
	if (!t->count)
		return 0;
	int rc = emit(t, commit);
	return rc ? rc : region_fence(t->r);
}

/* Logs all allocations and frees that are not logged yet. It is part of the commit. */
static int log_ops(scm_tx *t)
{
	size_t n;
	int rc = scmi_tx_merge_ops(t, &n);
	for (size_t i = 0; i < n && !rc; i++) {
		if (t->max - t->len < 32 && (rc = emit(t, true)))
			break;
		append_op(t, &t->words[i]);
	}
	if (rc)
		return rc;
	t->logged = t->nops;
	return settle_log(t, true);
}

static int log_spans(scm_tx *t, const struct span *ss, size_t n)
{
	int rc = log_some_ops(t);
	for (size_t i = 0; i < n && !rc; i++) {
		struct span s = ss[i];
		if (s.n == 0 || covered(t, &s))
			continue;
		if ((rc = scmi_tx_span(t, s.off, s.n)))
			break;
		while (s.n > 0) {
			if (t->max - t->len < 32 && (rc = emit(t, false)))
				break;
			uint64_t k = min64(s.n, (t->max - t->len - 16) & ~7u);
			append(t, OP_UNDO, s.off, k, k);
			s.off += k, s.n -= k;
		}
	}
	return rc ? rc : settle_log(t, false);
}

/* Writes the old content of the ranges, and allocations that are not logged yet as far as they fit, and makes it durable: one fence. If it fails nothing more may
 * be changed than before. */
int scmi_tx_log(scm_tx *t, const struct span *ss, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (ss[i].n && !scmi_undoable(&t->r->geo, ss[i].off, ss[i].n))
			return scmi_error(SCM_E_RANGE, "range of %llu bytes at %llu is not within the heap of region %s", (unsigned long long)ss[i].n,
					  (unsigned long long)ss[i].off, t->r->path);
	size_t logged = t->logged, nspans = t->nspans;
	int rc = log_spans(t, ss, n);
	if (rc) {
		t->logged = logged, t->nspans = nspans;
		t->count = 0, t->len = REC_HEAD;
	}
	return rc;
}

/* Logs what is not logged, and carries allocations and frees out. */
int scmi_tx_settle_ops(scm_tx *t)
{
	struct mem *m = &t->r->mem;
	if (t->logged < t->nops) {
		int rc = log_ops(t);
		if (rc)
			return rc;
	}
	for (size_t i = 0; i < t->nops; i++) {
		const struct alloc_op *op = &t->ops[i];
		if (op->undone)
			continue;
		if (op->op == OP_UNDO)
			mem_store64(m, op->at, op->val);
		else if (op->op == OP_SET)
			mem_or64(m, op->at, op->val);
		else
			mem_andnot64(m, op->at, op->val);
		mem_flush(m, op->at, 8);
	}
	return 0;
}

/* Makes all records of this transaction invalid: one word, one line. */
static int void_log(scm_tx *t)
{
	if (!t->seq)
		return 0;
	uint64_t at = geo_lane(&t->r->geo, t->lane);
	mem_store64(&t->r->mem, at, t->gen + 1);
	mem_flush(&t->r->mem, at, 8);
	return region_fence(t->r);
}

int scmi_tx_finish(scm_tx *t)
{
	struct mem *m = &t->r->mem;
	uint64_t last = UINT64_MAX;
	int rc;
	for (size_t i = 0; i < t->nspans; i++) {
		/* Neighbours in one line are flushed once. */
		uint64_t from = t->spans[i].off / SCM_LINE, to = (t->spans[i].off + t->spans[i].n - 1) / SCM_LINE;
		if (from != to || from != last) {
			mem_flush(m, t->spans[i].off, t->spans[i].n);
			last = to;
		}
	}
	if ((t->nspans || t->nops) && (rc = region_fence(t->r)))
		return rc;
	if ((rc = void_log(t)))
		return rc;
	for (size_t i = 0; i < t->nops; i++) {
		const struct alloc_op *op = &t->ops[i];
		if (op->freeable) {
			scmi_heap_end_free(t->r, op);
			scmi_heap_release(t->r, op);
		} else if (op->undone) {
			scmi_heap_release(t->r, op);
		} else {
			scmi_heap_settle(t->r, op);
		}
	}
	scmi_tx_drop_ext(t);
	return 0;
}

/* Takes everything back, from the log on the medium, by the code that recovery uses. */
int scmi_tx_rollback(scm_tx *t)
{
	struct lane_log l = {0};
	int rc = scmi_lane_read(t->r, t->lane, &l);
	if (rc) {
		rc = scmi_fail(t->r, rc);
	} else if (l.count) {
		scmi_undo(t->r, &l);
		rc = region_fence(t->r);
	}
	scmi_lane_log_free(&l);
	if (rc || (rc = void_log(t)))
		return rc;
	for (size_t i = 0; i < t->nops; i++) {
		if (t->ops[i].freeable)
			scmi_heap_end_free(t->r, &t->ops[i]);
		else
			scmi_heap_release(t->r, &t->ops[i]);
	}
	scmi_tx_drop_ext(t);
	return 0;
}
