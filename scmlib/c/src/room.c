/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Room for the log of allocations and frees, which must not fail because the region is full: docs/scm.md, "Room for the log". The heap keeps back as many chunks
 * as the log of the largest commit takes. Only a commit may use them, and one at a time: it has then all it needs, and waits for nothing. */
#include "internal.h"

#include <stdlib.h>

#include "tx.h"

enum {
	WORD_ENTRIES = 2 * 16,                           /* bytes of the log: one SET and one CLEAR for a word of a bitmap */
	MAX_TAIL = 1 << 10,
	TAIL_HEAD = REC_HEAD + (SCM_LINE - 1) + SCM_LINE, /* what of the tail is not entries: head, padding, LINK */
};

uint32_t scmi_max_record(const struct geometry *g) { return (uint32_t)min64(g->lane_size - 2 * SCM_LINE, 8 << 10); }

struct room scmi_room(const struct geometry *g)
{
	uint64_t all = g->chunk_count * max64(WORD_ENTRIES * (geo_bitmap(g) / 8), TABLE_ENTRY);
	uint64_t tail = min64(align_up(all + TAIL_HEAD, SCM_LINE), min64(g->lane_size / 2 / SCM_LINE * SCM_LINE, MAX_TAIL));
	struct room w = {.record = scmi_max_record(g) - 64};
	if (tail > TAIL_HEAD)
		w.tail = tail, w.entries = tail - TAIL_HEAD;
	w.records = (g->chunk_size - SCM_LINE) / align_up(scmi_max_record(g), SCM_LINE);
	return w;
}

uint64_t scmi_run_entries(const struct geometry *g, uint8_t class) { return WORD_ENTRIES * (((uint64_t)geo_blocks(g, class) + 63) / 64); }

/* How many chunks are kept back if the log needs so many bytes of entries more than now. The lock is held. */
uint32_t scmi_heap_keep(const struct heap *h, uint64_t grow)
{
	const struct room *w = &h->room;
	uint64_t entries = h->entries + grow;
	return entries <= w->entries ? 0 : (uint32_t)((entries / w->record + w->records) / w->records);
}

/* May so many chunks be taken for data, or for a log that is not that of a commit? What a commit has borrowed comes back. The lock is held. */
bool scmi_heap_available(const struct heap *h, uint32_t count, uint64_t grow)
{
	return h->free >= count && (uint64_t)h->free + h->lent >= (uint64_t)count + scmi_heap_keep(h, grow);
}

/* What data can have. As ever, another thread may have it first. */
uint64_t scmi_heap_free_bytes(const scm_region *r)
{
	uint32_t keep = scmi_heap_keep(&r->heap, 0), n = r->heap.free;
	return n > keep ? (uint64_t)(n - keep) * r->geo.chunk_size : 0;
}

/* Reserves a chunk in which the log goes on. That of a commit may have one of those that are kept back. */
int scmi_tx_segment(scm_tx *t, bool commit, uint32_t *chunk)
{
	int rc = scmi_heap_take(t->r, 1, chunk);
	if (rc != SCM_E_FULL || !commit)
		return rc;
	if (!t->borrows) {
		pthread_mutex_lock(&t->r->heap.borrowing);
		t->borrows = true;
	}
	/* None is left in a region that was filled by a version of this library that kept nothing back. */
	if (scmi_heap_borrow(t->r, chunk))
		t->lent++, rc = 0;
	return rc;
}

/* Gives back the chunks that the log has taken. */
void scmi_tx_drop_ext(scm_tx *t)
{
	scmi_heap_return(t->r, t->ext, t->next_ext, t->lent);
	t->next_ext = 0, t->lent = 0;
	scmi_tx_end_borrow(t);
}

/* Lets the next commit have what is kept back. */
void scmi_tx_end_borrow(scm_tx *t)
{
	if (t->borrows) {
		t->borrows = false;
		pthread_mutex_unlock(&t->r->heap.borrowing);
	}
}

static bool before(const struct word_op *a, const struct word_op *b) { return a->at != b->at ? a->at < b->at : a->op < b->op; }

static void sift(struct word_op *w, size_t i, size_t n)
{
	for (size_t kid; (kid = 2 * i + 1) < n; i = kid) {
		if (kid + 1 < n && before(&w[kid], &w[kid + 1]))
			kid++;
		if (!before(&w[i], &w[kid]))
			return;
		struct word_op x = w[i];
		w[i] = w[kid], w[kid] = x;
	}
}

/* By word and kind. Not qsort, which may allocate, in a program whose malloc may be this library's. */
static void sort(struct word_op *w, size_t n)
{
	for (size_t i = n / 2; i-- > 0;)
		sift(w, i, n);
	while (n-- > 1) {
		struct word_op x = w[0];
		w[0] = w[n], w[n] = x;
		sift(w, 0, n);
	}
}

/* What has to be logged for the allocations and frees that are not logged yet: one entry for each word and kind, in t->words. */
int scmi_tx_merge_ops(scm_tx *t, size_t *count)
{
	size_t n = 0;
	int rc = scmi_tx_reserve(&t->words, &t->cap_words, t->nops - t->logged, sizeof(*t->words));
	if (rc)
		return rc;
	for (size_t i = t->logged; i < t->nops; i++)
		if (!t->ops[i].undone)
			t->words[n++] = (struct word_op){t->ops[i].at, t->ops[i].val, t->ops[i].op};
	sort(t->words, n);
	*count = 0;
	for (size_t i = 0; i < n; i++) {
		struct word_op *last = *count ? &t->words[*count - 1] : NULL;
		if (last && last->at == t->words[i].at && last->op == t->words[i].op)
			last->mask |= t->words[i].mask;
		else
			t->words[(*count)++] = t->words[i];
	}
	return 0;
}
