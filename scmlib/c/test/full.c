/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* A region that is full: what makes room needs none. A command of tool.c. */
#include "common.h"
#include "internal.h"

struct found {
	scm_off *offs;
	size_t n, cap;
};

static int find(scm_off off, uint64_t size, void *arg)
{
	struct found *f = arg;
	(void)size;
	if (f->n == f->cap)
		CHECK(f->offs = realloc(f->offs, (f->cap = f->cap * 2 + 64) * sizeof(*f->offs)));
	f->offs[f->n++] = off;
	return 0;
}

static struct found blocks_of(scm_region *r)
{
	struct found f = {0};
	TRY(scm_blocks(r, find, &f));
	return f;
}

/* Allocates until the region is full, and commits that. */
static size_t fill(scm_region *r, scm_tx *t, size_t bytes)
{
	size_t n = 0;
	int rc;
	void *p;
	if (!t)
		TRY(scm_tx_begin(r, &t));
	while (!(rc = scm_tx_alloc(t, bytes, &p)))
		n++;
	CHECK(rc == SCM_E_FULL);
	TRY(scm_tx_commit(t));
	return n;
}

/* Frees every block whose number is k, modulo m, in a transaction that stays open. */
static scm_tx *release(scm_region *r, const struct found *f, size_t k, size_t m)
{
	scm_tx *t;
	TRY(scm_tx_begin(r, &t));
	for (size_t i = k; i < f->n; i += m)
		TRY(scm_tx_free(t, scm_ptr(r, f->offs[(i * 7919) % f->n])));
	return t;
}

static size_t count(scm_region *r)
{
	struct found f = blocks_of(r);
	free(f.offs);
	return f.n;
}

/* full PATH BYTES: frees all that a region holds, which may be full, in one transaction; fills it; frees and allocates at once on the full region; leaves it full. */
int cmd_full(char **a)
{
	scm_region *r;
	size_t bytes = strtoul(a[1], NULL, 10);
	TRY(scm_open(&r, a[0], NULL));
	struct found f = blocks_of(r);
	TRY(scm_tx_abort(release(r, &f, 0, 1)));
	CHECK(count(r) == f.n);
	TRY(scm_tx_commit(release(r, &f, 0, 1)));
	CHECK(count(r) == 0);
	free(f.offs);

	size_t n = fill(r, NULL, bytes);
	CHECK(count(r) == n);
	f = blocks_of(r);
	TRY(scm_tx_commit(release(r, &f, 0, 2)));
	/* The words of all bitmaps are both set and cleared by one commit. */
	size_t more = fill(r, release(r, &f, 1, 2), bytes);
	CHECK(count(r) == more);
	free(f.offs);
	more += fill(r, NULL, bytes);
	CHECK(more == n && count(r) == n);
	printf("%zu blocks\n", n);
	TRY(scm_close(r));
	return 0;
}
