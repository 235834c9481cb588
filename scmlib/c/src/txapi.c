/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Transactions as scm.h has them: arguments, guards, lanes. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

#include "tx.h"

static void give_back(scm_tx *t)
{
	scm_region *r = t->r;
	t->live = false;
	scmi_tx_end_borrow(t); /* if the medium failed */
	pthread_mutex_lock(&r->lock);
	t->next = r->tx_free;
	r->tx_free = t;
	r->tx_idle++;
	pthread_cond_signal(&r->freed);
	pthread_mutex_unlock(&r->lock);
}

static int begin(void *p)
{
	scm_tx *t = p;
	uint64_t base = geo_lane(&t->r->geo, t->lane);
	t->gen = mem_load64(&t->r->mem, base);
	t->pos = base + SCM_LINE, t->end = base + t->r->geo.lane_size;
	t->seq = t->count = 0;
	t->logged = t->nops = t->nspans = t->next_ext = 0;
	t->lent = 0;
	t->len = REC_HEAD;
	t->live = true;
	return 0;
}

int scm_tx_begin(scm_region *r, scm_tx **out)
{
	int rc = scmi_broken(r);
	if (rc)
		return rc;
	if (!out)
		return scmi_error(SCM_E_INVALID, "the place for the transaction is NULL");
	if (r->read_only)
		return scmi_error(SCM_E_READONLY, "region %s is open read-only", r->path);
	pthread_mutex_lock(&r->lock);
	while (!r->tx_free)
		pthread_cond_wait(&r->freed, &r->lock);
	scm_tx *t = r->tx_free;
	r->tx_free = t->next;
	r->tx_idle--;
	pthread_mutex_unlock(&r->lock);
	if (!t->buf && !(t->buf = malloc(t->max + SCM_LINE)))
		rc = scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno));
	if (!rc)
		rc = scmi_broken(r); /* it may have failed while this thread waited */
	if (!rc)
		rc = scmi_guarded(r, begin, t);
	if (rc)
		give_back(t);
	else
		*out = t;
	return rc;
}

static int usable(scm_tx *t)
{
	if (!t)
		return scmi_error(SCM_E_INVALID, "the transaction is NULL");
	return t->live ? scmi_broken(t->r) : scmi_error(SCM_E_TXDONE, "the transaction has ended");
}

struct add_args {
	scm_tx *t;
	const struct span *ss;
	size_t n;
};

static int add(void *p)
{
	struct add_args *a = p;
	return scmi_tx_log(a->t, a->ss, a->n);
}

int scm_tx_add_ranges(scm_tx *t, const struct scm_range *ranges, size_t count)
{
	int rc = usable(t);
	if (rc)
		return rc;
	struct span few[16], *ss = few;
	if (count > 16 && !(ss = calloc(count, sizeof(*ss))))
		return scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno));
	for (size_t i = 0; i < count && !rc; i++) {
		ss[i] = (struct span){(uint64_t)(uintptr_t)ranges[i].addr - (uint64_t)(uintptr_t)t->r->mem.base, ranges[i].len};
		if (ss[i].n && !geo_in_heap(&t->r->geo, ss[i].off, ss[i].n)) /* the root record and the table are the library's */
			rc = scmi_error(SCM_E_RANGE, "address %p, %zu bytes, is not within the heap of region %s", ranges[i].addr, ranges[i].len, t->r->path);
	}
	struct add_args a = {t, ss, count};
	if (!rc)
		rc = scmi_guarded(t->r, add, &a);
	if (ss != few)
		free(ss);
	return rc;
}

int scm_tx_add(scm_tx *t, const void *addr, size_t n)
{
	struct scm_range one = {addr, n};
	return scm_tx_add_ranges(t, &one, 1);
}

int scm_tx_dirty(scm_tx *t, const void *addr, size_t n)
{
	int rc = usable(t);
	if (rc)
		return rc;
	uint64_t off = (uint64_t)(uintptr_t)addr - (uint64_t)(uintptr_t)t->r->mem.base;
	if (!geo_in_heap(&t->r->geo, off, n))
		return scmi_error(SCM_E_RANGE, "address %p, %zu bytes, is not within the heap of region %s", addr, n, t->r->path);
	return n ? scmi_tx_span(t, off, n) : 0;
}

struct alloc_args {
	scm_tx *t;
	size_t n;
	void *addr;
};

static int alloc(void *p)
{
	struct alloc_args *a = p;
	scm_tx *t = a->t;
	struct alloc_op op;
	int rc = scmi_tx_reserve(&t->ops, &t->cap_ops, t->nops + 1, sizeof(*t->ops));
	if (!rc)
		rc = scmi_tx_reserve(&t->spans, &t->cap_spans, t->nspans + 1, sizeof(*t->spans));
	if (!rc)
		rc = scmi_heap_alloc(t->r, max64(a->n, 1), &op);
	if (rc)
		return rc;
	t->ops[t->nops++] = op;
	mem_zero(&t->r->mem, op.block, op.n);
	t->spans[t->nspans++] = (struct span){op.block, op.n};
	a->addr = t->r->mem.base + op.block;
	return 0;
}

int scm_tx_alloc(scm_tx *t, size_t n, void **out)
{
	int rc = usable(t);
	if (rc)
		return rc;
	if (!out)
		return scmi_error(SCM_E_INVALID, "the place for the address is NULL");
	struct alloc_args a = {t, n, NULL};
	if (!(rc = scmi_guarded(t->r, alloc, &a)))
		*out = a.addr;
	return rc;
}

static int release(void *p)
{
	struct alloc_args *a = p;
	scm_tx *t = a->t;
	uint64_t off = (uint64_t)(uintptr_t)a->addr - (uint64_t)(uintptr_t)t->r->mem.base;
	struct alloc_op op;
	int rc = scmi_tx_reserve(&t->ops, &t->cap_ops, t->nops + 1, sizeof(*t->ops));
	if (rc)
		return rc;
	if (!(rc = scmi_heap_start_free(t->r, off, &op))) {
		t->ops[t->nops++] = op;
		return 0;
	}
	/* It may be one that this transaction has allocated, which is not on the medium yet. */
	for (size_t i = 0; i < t->nops; i++) {
		struct alloc_op *own = &t->ops[i];
		if (own->block == off && !own->freeable && !own->undone) {
			own->undone = true;
			return 0;
		}
	}
	return rc;
}

int scm_tx_free(scm_tx *t, void *addr)
{
	int rc = usable(t);
	struct alloc_args a = {t, 0, addr};
	return rc ? rc : scmi_guarded(t->r, release, &a);
}

static int commit(void *p)
{
	scm_tx *t = p;
	if (t->nops) {
		int rc = scmi_tx_settle_ops(t);
		if (rc) {
			char why[512];
			strncpy(why, scm_errormsg(), sizeof(why) - 1);
			why[sizeof(why) - 1] = 0;
			if (scmi_tx_rollback(t))
				return scmi_prefix(SCM_E_CLOSED, "%s; roll back", why);
			return scmi_error(rc, "%s", why);
		}
	}
	return scmi_tx_finish(t);
}

static int rollback(void *p) { return scmi_tx_rollback(p); }

/* A fault half way through leaves a state that only recovery puts right. */
static int end(scm_tx *t, int (*fn)(void *))
{
	int rc = usable(t);
	if (rc == SCM_E_TXDONE || rc == SCM_E_INVALID)
		return rc;
	if (!rc)
		rc = scmi_guarded(t->r, fn, t);
	if (rc == SCM_E_MEDIA && !atomic_load(&t->r->failed))
		rc = scmi_fail(t->r, rc);
	give_back(t);
	return rc;
}

int scm_tx_commit(scm_tx *t) { return end(t, commit); }
int scm_tx_abort(scm_tx *t) { return end(t, rollback); }

/* In one step ---------------------------------------------------------------------------------------------------- */

int scm_alloc_to(scm_region *r, scm_off *slot, size_t n)
{
	scm_tx *t;
	void *p;
	int rc = scm_tx_begin(r, &t);
	if (rc)
		return rc;
	if (!(rc = scm_tx_alloc(t, n, &p)) && !(rc = scm_tx_add(t, slot, sizeof(*slot)))) {
		*slot = scm_offset(r, p);
		return scm_tx_commit(t);
	}
	scm_tx_abort(t);
	return rc;
}

int scm_free_from(scm_region *r, scm_off *slot)
{
	scm_tx *t;
	int rc = scm_tx_begin(r, &t);
	if (rc)
		return rc;
	if (!(rc = scm_tx_free(t, r->mem.base + *slot)) && !(rc = scm_tx_add(t, slot, sizeof(*slot)))) {
		*slot = 0;
		return scm_tx_commit(t);
	}
	scm_tx_abort(t);
	return rc;
}
