/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "preload.h"

/* Free spans by length: those below LISTS exactly, all longer ones in list 0, of which the shortest that fits is taken. */
#define LISTS 128
static uint32_t lists[LISTS];

struct pheap scmp_heap = {.lock = PTHREAD_MUTEX_INITIALIZER};
#define H scmp_heap

static uint32_t *list_of(uint32_t len) { return &lists[len < LISTS ? len : 0]; }

static void put(uint32_t first, uint32_t len)
{
	struct page *p = &H.page[first], *last = &H.page[first + len - 1];
	uint32_t *list = list_of(len);
	last->kind = PAGE_FREE, last->len = len, last->first = first;
	p->kind = PAGE_FREE, p->len = len, p->first = first;
	p->prev = 0, p->next = *list;
	if (*list)
		H.page[*list].prev = first;
	*list = first;
}

static void remove_from_list(uint32_t first)
{
	struct page *p = &H.page[first];
	if (p->prev)
		H.page[p->prev].next = p->next;
	else
		*list_of(p->len) = p->next;
	if (p->next)
		H.page[p->next].prev = p->prev;
	H.page[first + p->len - 1].kind = PAGE_NONE;
	p->kind = PAGE_NONE;
}

/* Joins a span with free neighbours. The end of what was ever used moves down again if the span touches it. */
static void give(uint32_t first, uint32_t len)
{
	if (first > 1 && H.page[first - 1].kind == PAGE_FREE) {
		uint32_t before = H.page[first - 1].first;
		remove_from_list(before);
		len += first - before;
		first = before;
	}
	if (first + len < H.top && H.page[first + len].kind == PAGE_FREE) {
		uint32_t after = first + len;
		len += H.page[after].len;
		remove_from_list(after);
	}
	put(first, len);
}

static uint32_t best(uint32_t pages)
{
	for (uint32_t n = pages; n < LISTS; n++)
		if (lists[n])
			return lists[n];
	uint32_t found = 0;
	for (uint32_t s = lists[0]; s; s = H.page[s].next)
		if (H.page[s].len >= pages && (!found || H.page[s].len < H.page[found].len))
			found = s;
	return found;
}

/* align is in pages, a power of two. */
uint32_t scmp_span(uint32_t pages, uint32_t align)
{
	uint32_t slack = align - 1, first = 0, len = 0;
	pthread_mutex_lock(&H.lock);
	if (pages <= H.pages - slack && (first = best(pages + slack))) {
		len = H.page[first].len;
		remove_from_list(first);
	} else if (pages + slack <= H.pages - H.top && pages + slack >= pages) {
		first = H.top;
		len = pages + slack;
		H.top += len;
	}
	if (first) {
		uintptr_t at = ((uintptr_t)scmp_addr(first) / PAGE + slack) / align * align;
		uint32_t skip = (uint32_t)(at - (uintptr_t)scmp_addr(first) / PAGE);
		if (skip + pages < len)
			give(first + skip + pages, len - skip - pages);
		if (skip)
			give(first, skip);
		first += skip;
		H.page[first] = (struct page){.first = first, .len = pages, .kind = PAGE_LARGE};
		H.large += pages;
	}
	pthread_mutex_unlock(&H.lock);
	return first;
}

void scmp_span_free(uint32_t first)
{
	pthread_mutex_lock(&H.lock);
	uint32_t len = H.page[first].len;
	H.large -= len;
	H.page[first].kind = H.page[first + len - 1].kind = PAGE_NONE;
	give(first, len);
	pthread_mutex_unlock(&H.lock);
}

/* In place, if what follows is free. */
bool scmp_span_grow(uint32_t first, uint32_t pages)
{
	pthread_mutex_lock(&H.lock);
	uint32_t len = H.page[first].len, after = first + len, more = pages - len;
	bool ok = false;
	if (after < H.top && H.page[after].kind == PAGE_FREE && H.page[after].len >= more) {
		uint32_t rest = H.page[after].len - more;
		remove_from_list(after);
		if (rest)
			put(after + more, rest);
		ok = true;
	} else if (after == H.top && more <= H.pages - H.top) {
		H.top += more;
		ok = true;
	}
	if (ok) {
		H.page[first].len = pages;
		H.large += more;
	}
	pthread_mutex_unlock(&H.lock);
	return ok;
}

void scmp_span_shrink(uint32_t first, uint32_t pages)
{
	pthread_mutex_lock(&H.lock);
	uint32_t len = H.page[first].len;
	if (pages < len) {
		H.page[first].len = pages;
		H.large -= len - pages;
		give(first + pages, len - pages);
	}
	pthread_mutex_unlock(&H.lock);
}
