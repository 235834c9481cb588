/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The allocator's view in memory: what is used on the medium, and what running transactions have reserved. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

enum { MEM_FREE, MEM_RUN, MEM_LARGE, MEM_FREEING, MEM_TAIL, MEM_RESERVED };

static int nomem(void) { return scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno)); }

/* The guard must find the lock if a memory fault leaves this code by longjmp. */
static void lock(struct heap *h)
{
	pthread_mutex_lock(&h->lock);
	scmi_held = &h->lock;
}
static void unlock(struct heap *h)
{
	scmi_held = NULL;
	pthread_mutex_unlock(&h->lock);
}

static void list_add(struct heap *h, struct run *u)
{
	u->listed = true;
	u->prev = NULL;
	u->next = h->partial[u->class];
	if (u->next)
		u->next->prev = u;
	h->partial[u->class] = u;
}

static void list_remove(struct heap *h, struct run *u)
{
	if (!u->listed)
		return;
	u->listed = false;
	if (u->prev)
		u->prev->next = u->next;
	else
		h->partial[u->class] = u->next;
	if (u->next)
		u->next->prev = u->prev;
}

static int add_run(scm_region *r, uint32_t c, uint8_t class)
{
	struct heap *h = &r->heap;
	uint32_t n = geo_blocks(&r->geo, class), words = (n + 63) / 64;
	struct run *u = calloc(1, sizeof(*u) + 16ull * words);
	if (!u)
		return nomem();
	*u = (struct run){.chunk = c, .class = class, .nfree = n, .words = words};
	u->used = (uint64_t *)(void *)(u + 1);
	u->freeing = u->used + words;
	h->runs[c] = u;
	h->kind[c] = MEM_RUN;
	h->entries += scmi_run_entries(&r->geo, class);
	list_add(h, u);
	return 0;
}

/* Checks a chunk table and builds on it. Bitmaps of runs are read when a run is first needed. */
int scmi_heap_new(scm_region *r, const uint64_t *table)
{
	struct heap *h = &r->heap;
	const struct geometry *g = &r->geo;
	pthread_mutex_init(&h->lock, NULL);
	pthread_mutex_init(&h->borrowing, NULL);
	h->room = scmi_room(g);
	h->kind = calloc(g->chunk_count, 1);
	h->runs = calloc(g->chunk_count, sizeof(*h->runs));
	if (!h->kind || !h->runs)
		return nomem();
	for (uint32_t c = 0; c < g->chunk_count;) {
		uint64_t w = table[c];
		uint8_t kind = (uint8_t)w, class = (uint8_t)(w >> 8);
		uint32_t count = (uint32_t)(w >> 32);
		if (w == 0) {
			h->free++;
			c++;
		} else if (kind == CHUNK_RUN && class < NCLASSES && geo_blocks(g, class) >= 2 && w == chunk_word(CHUNK_RUN, class, 0)) {
			int rc = add_run(r, c, class);
			if (rc)
				return rc;
			c++;
		} else if (kind == CHUNK_LARGE && count >= 1 && count <= g->chunk_count - c && w == chunk_word(CHUNK_LARGE, 0, count)) {
			h->kind[c] = MEM_LARGE;
			h->entries += TABLE_ENTRY;
			for (uint32_t i = c + 1; i < c + count; i++) {
				if (table[i])
					return scmi_error(SCM_E_CORRUPT, "region is damaged: chunk %u lies inside the block at chunk %u", i, c);
				h->kind[i] = MEM_TAIL;
			}
			c += count;
		} else {
			return scmi_error(SCM_E_CORRUPT, "region is damaged: chunk table, word %u is %#llx", c, (unsigned long long)w);
		}
	}
	return 0;
}

void scmi_heap_free(scm_region *r)
{
	struct heap *h = &r->heap;
	if (h->runs)
		for (uint32_t c = 0; c < r->geo.chunk_count; c++)
			free(h->runs[c]);
	free(h->runs);
	free(h->kind);
	h->runs = NULL, h->kind = NULL;
}

/* Bits behind the last block are set in memory, so that they are never handed out. */
static void load(scm_region *r, struct run *u)
{
	if (u->loaded)
		return;
	uint32_t n = geo_blocks(&r->geo, u->class);
	u->nfree = 0;
	for (uint32_t i = 0; i < u->words; i++) {
		u->used[i] = mem_load64(&r->mem, geo_chunk(&r->geo, u->chunk) + 8ull * i);
		if (n - 64 * i < 64)
			u->used[i] |= ~0ull << (n - 64 * i);
		u->nfree += (uint32_t)__builtin_popcountll(~u->used[i]);
	}
	u->loaded = true;
}

/* Frees runs in which nothing is allocated or reserved. */
static int reclaim(scm_region *r)
{
	struct heap *h = &r->heap;
	bool any = false;
	for (uint32_t c = 0; c < r->geo.chunk_count; c++) {
		struct run *u = h->runs[c];
		if (!u)
			continue;
		load(r, u);
		if (u->nfree != geo_blocks(&r->geo, u->class))
			continue;
		mem_store64(&r->mem, geo_word(&r->geo, c), 0);
		mem_flush(&r->mem, geo_word(&r->geo, c), 8);
		list_remove(h, u);
		h->entries -= scmi_run_entries(&r->geo, u->class);
		h->runs[c] = NULL;
		free(u);
		h->kind[c] = MEM_FREE;
		h->free++;
		any = true;
	}
	/* Before the chunk becomes data: the word must not say "run" then. */
	return any ? region_fence(r) : 0;
}

static bool find(const struct heap *h, uint32_t chunks, uint32_t from, uint32_t count, uint32_t *at)
{
	uint32_t row = 0;
	for (uint32_t c = from; c < chunks; c++) {
		if (h->kind[c] != MEM_FREE) {
			row = 0;
		} else if (++row == count) {
			*at = c + 1 - count;
			return true;
		}
	}
	return false;
}

/* Reserves count free chunks in a row. With what becomes of them the log needs grow bytes of entries more. */
static int take(scm_region *r, uint32_t count, uint64_t grow, uint32_t *at)
{
	struct heap *h = &r->heap;
	uint32_t chunks = r->geo.chunk_count;
	for (int pass = 0; pass < 2; pass++) {
		if (scmi_heap_available(h, count, grow) && (find(h, chunks, h->hint, count, at) || find(h, chunks, 0, count, at))) {
			memset(h->kind + *at, MEM_RESERVED, count);
			h->free -= count;
			h->hint = *at + count;
			return 0;
		}
		int rc = pass == 0 ? reclaim(r) : 0;
		if (rc)
			return rc;
	}
	return scmi_error(SCM_E_FULL, "region %s is full: no %llu free bytes in a row, beside %llu that are kept for the log of commits", r->path,
			  (unsigned long long)count * r->geo.chunk_size, (unsigned long long)scmi_heap_keep(h, grow) * r->geo.chunk_size);
}

int scmi_heap_take(scm_region *r, uint32_t count, uint32_t *chunk)
{
	lock(&r->heap);
	int rc = take(r, count, 0, chunk);
	unlock(&r->heap);
	return rc;
}

bool scmi_heap_borrow(scm_region *r, uint32_t *chunk)
{
	struct heap *h = &r->heap;
	lock(h);
	bool ok = find(h, r->geo.chunk_count, 0, 1, chunk);
	if (ok)
		h->kind[*chunk] = MEM_RESERVED, h->free--, h->lent++;
	unlock(h);
	return ok;
}

/* Outside any transaction: a run without blocks is not a leak, and others may take blocks from it before the transaction that needed it ends. */
static int new_run(scm_region *r, uint8_t class)
{
	struct mem *m = &r->mem;
	uint32_t c;
	int rc = take(r, 1, scmi_run_entries(&r->geo, class), &c);
	if (rc)
		return rc;
	mem_zero(m, geo_chunk(&r->geo, c), geo_bitmap(&r->geo));
	mem_flush(m, geo_chunk(&r->geo, c), geo_bitmap(&r->geo));
	if ((rc = region_fence(r)))
		return rc;
	mem_store64(m, geo_word(&r->geo, c), chunk_word(CHUNK_RUN, class, 0));
	mem_flush(m, geo_word(&r->geo, c), 8);
	if ((rc = region_fence(r)))
		return rc;
	/* Without memory for it the chunk stays reserved until the next open, which finds an empty run. */
	return add_run(r, c, class);
}

static int alloc_large(scm_region *r, uint64_t n, struct alloc_op *op)
{
	if (n > r->geo.size)
		return scmi_error(SCM_E_FULL, "region %s is full: it has %llu bytes, not %llu", r->path, (unsigned long long)r->geo.size, (unsigned long long)n);
	uint32_t c, count = (uint32_t)((n + r->geo.chunk_size - 1) / r->geo.chunk_size);
	int rc = take(r, count, TABLE_ENTRY, &c);
	if (rc)
		return rc;
	r->heap.entries += TABLE_ENTRY;
	*op = (struct alloc_op){.op = OP_UNDO, .at = geo_word(&r->geo, c), .val = chunk_word(CHUNK_LARGE, 0, count), .block = geo_chunk(&r->geo, c),
		.n = (uint64_t)count * r->geo.chunk_size, .chunks = count};
	return 0;
}

static int alloc(scm_region *r, uint64_t n, struct alloc_op *op)
{
	struct heap *h = &r->heap;
	int class = scmi_class_of(&r->geo, n);
	if (class < 0)
		return alloc_large(r, n, op);
	struct run *u;
	for (;;) {
		u = h->partial[class];
		if (!u) {
			int rc = new_run(r, (uint8_t)class);
			if (rc)
				return rc;
			continue;
		}
		load(r, u);
		if (u->nfree)
			break;
		list_remove(h, u);
	}
	while (u->used[u->hint] == ~0ull)
		u->hint = (u->hint + 1) % u->words;
	unsigned bit = (unsigned)__builtin_ctzll(~u->used[u->hint]);
	u->used[u->hint] |= 1ull << bit;
	u->nfree--;
	uint64_t base = geo_chunk(&r->geo, u->chunk), size = scmi_class_sizes[class];
	*op = (struct alloc_op){.op = OP_SET, .at = base + 8ull * u->hint, .val = 1ull << bit, .run = u, .n = size,
		.block = base + geo_bitmap(&r->geo) + size * (64ull * u->hint + bit)};
	return 0;
}

/* Reserves a block of at least n bytes and tells what the commit has to do for it. */
int scmi_heap_alloc(scm_region *r, uint64_t n, struct alloc_op *op)
{
	lock(&r->heap);
	int rc = alloc(r, n, op);
	unlock(&r->heap);
	return rc;
}

static void release_chunks(scm_region *r, const struct alloc_op *op)
{
	uint32_t c = geo_chunk_of(&r->geo, op->block);
	memset(r->heap.kind + c, MEM_FREE, op->chunks);
	r->heap.free += op->chunks;
	r->heap.hint = (uint32_t)min64(r->heap.hint, c);
}

/* Takes back what a log had. */
void scmi_heap_return(scm_region *r, const struct alloc_op *ext, size_t n, uint32_t lent)
{
	lock(&r->heap);
	for (size_t i = 0; i < n; i++)
		release_chunks(r, &ext[i]);
	r->heap.lent -= lent;
	unlock(&r->heap);
}

/* Takes a reservation or an allocation back, in memory. */
void scmi_heap_release(scm_region *r, const struct alloc_op *op)
{
	struct heap *h = &r->heap;
	lock(h);
	if (!op->run) {
		release_chunks(r, op);
		h->entries -= TABLE_ENTRY;
	} else {
		struct run *u = op->run;
		uint64_t i = (op->at - geo_chunk(&r->geo, u->chunk)) / 8;
		if (u->used[i] & op->val) {
			u->used[i] &= ~op->val;
			u->nfree++;
			if (!u->listed)
				list_add(h, u);
		}
	}
	unlock(h);
}

/* Marks a large block as allocated, in memory. */
void scmi_heap_settle(scm_region *r, const struct alloc_op *op)
{
	if (op->run)
		return;
	lock(&r->heap);
	uint32_t c = geo_chunk_of(&r->geo, op->block);
	memset(r->heap.kind + c, MEM_TAIL, op->chunks);
	r->heap.kind[c] = MEM_LARGE;
	unlock(&r->heap);
}

static int start_free(scm_region *r, uint64_t off, struct alloc_op *op)
{
	const struct geometry *g = &r->geo;
	struct heap *h = &r->heap;
	uint32_t c = geo_chunk_of(g, off);
	uint64_t base = geo_chunk(g, c);
	if (h->kind[c] == MEM_LARGE || h->kind[c] == MEM_FREEING) {
		uint64_t w = mem_load64(&r->mem, geo_word(g, c));
		uint32_t count = (uint32_t)(w >> 32);
		if (off != base || (uint8_t)w != CHUNK_LARGE)
			goto bad;
		if (count == 0 || count > g->chunk_count - c)
			return scmi_error(SCM_E_CORRUPT, "region is damaged: chunk table, word %u", c);
		if (h->kind[c] == MEM_FREEING)
			goto twice;
		*op = (struct alloc_op){.op = OP_UNDO, .at = geo_word(g, c), .block = off, .chunks = count, .n = (uint64_t)count * g->chunk_size, .freeable = true};
		h->kind[c] = MEM_FREEING;
		return 0;
	}
	if (h->kind[c] == MEM_RUN) {
		struct run *u = h->runs[c];
		load(r, u);
		uint64_t size = scmi_class_sizes[u->class], at = off - base, i = (at - geo_bitmap(g)) / size;
		if (at < geo_bitmap(g) || (at - geo_bitmap(g)) % size || i >= geo_blocks(g, u->class))
			goto bad;
		*op = (struct alloc_op){.op = OP_CLEAR, .at = base + 8 * (i / 64), .val = 1ull << i % 64, .block = off, .run = u, .n = size, .freeable = true};
		if (!(mem_load64(&r->mem, op->at) & op->val))
			goto bad;
		if (u->freeing[i / 64] & op->val)
			goto twice;
		u->freeing[i / 64] |= op->val;
		return 0;
	}
bad:
	return scmi_error(SCM_E_FREE, "offset %llu: no allocated block starts there", (unsigned long long)off);
twice:
	return scmi_error(SCM_E_FREE, "offset %llu is being freed already", (unsigned long long)off);
}

/* Finds an allocated block and claims it for the caller's transaction. */
int scmi_heap_start_free(scm_region *r, uint64_t off, struct alloc_op *op)
{
	if (!geo_in_heap(&r->geo, off, 1))
		return scmi_error(SCM_E_FREE, "offset %llu is not in the heap of region %s", (unsigned long long)off, r->path);
	lock(&r->heap);
	int rc = start_free(r, off, op);
	unlock(&r->heap);
	return rc;
}

void scmi_heap_end_free(scm_region *r, const struct alloc_op *op)
{
	struct heap *h = &r->heap;
	lock(h);
	if (op->run) {
		op->run->freeing[(op->at - geo_chunk(&r->geo, op->run->chunk)) / 8] &= ~op->val;
	} else {
		uint32_t c = geo_chunk_of(&r->geo, op->block);
		if (h->kind[c] == MEM_FREEING)
			h->kind[c] = MEM_LARGE;
	}
	unlock(h);
}
