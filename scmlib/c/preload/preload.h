/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The heap of an unmodified program in a region. Nothing here is durable: what is where is kept in ordinary memory and dies with the process.
 *
 * Pages of 4 KiB are grouped into spans (pages.c). A span holds blocks of one class, or is one large block (alloc.c). Threads keep blocks of
 * each class at hand, so that most calls take no lock. Where the heap lies, and what becomes of it at fork: heap.c.
 */
#ifndef SCM_PRELOAD_H
#define SCM_PRELOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096ul
#define CLASSES 40
#define SMALL_MAX (32ul << 10)

enum { PAGE_NONE, PAGE_FREE, PAGE_SMALL, PAGE_LARGE };

/* One for each page of the heap, in ordinary memory. Of a span the first counts; first is set in all pages of a span of blocks. */
struct page {
	uint32_t first, len; /* pages; len also in the last page of a free span, to join it from behind */
	uint32_t prev, next; /* in a list of spans; 0 ends it */
	void *blocks;        /* free ones, of a span of blocks */
	uint16_t used, total;
	uint8_t kind, class;
	bool listed;
};

struct pheap {
	uint8_t *base; /* page 0 is never used, so that 0 can mean none */
	uint32_t pages;
	uint32_t top; /* pages from here on were never used */
	struct page *page;
	pthread_mutex_t lock; /* of the pages */
	uint64_t large;       /* pages in large blocks and spans */
	bool in_region;
};
extern struct pheap scmp_heap;

/* heap.c */
bool scmp_ready(void); /* sets up the heap at the first call; false while that is under way in this thread */

/* pages.c: the lock is taken there */
uint32_t scmp_span(uint32_t pages, uint32_t align); /* 0: the heap is full */
void scmp_span_free(uint32_t first);
bool scmp_span_grow(uint32_t first, uint32_t pages);
void scmp_span_shrink(uint32_t first, uint32_t pages);

/* alloc.c */
void scmp_lock_all(void);
void scmp_unlock_all(bool child);

static inline uint32_t scmp_page_of(const void *p) { return (uint32_t)((uintptr_t)((const uint8_t *)p - scmp_heap.base) / PAGE); }
static inline void *scmp_addr(uint32_t page) { return scmp_heap.base + page * PAGE; }
static inline bool scmp_ours(const void *p)
{
	return (uintptr_t)p - (uintptr_t)scmp_heap.base < (uintptr_t)scmp_heap.pages * PAGE;
}

#endif
