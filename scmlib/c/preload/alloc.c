/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "preload.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define H scmp_heap

/* 16 to 128 in steps of 16, then four to a doubling, up to SMALL_MAX. */
static const uint32_t sizes[CLASSES] = {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792,
	2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768};

static inline unsigned class_of(size_t n)
{
	if (n <= 128)
		return n ? (unsigned)(n - 1) / 16 : 0;
	unsigned log = 63 - (unsigned)__builtin_clzl(n - 1); /* 7 for 129…256 */
	return 8 + (log - 7) * 4 + (unsigned)((n - 1) >> (log - 2) & 3);
}

/* Eight blocks at least, four pages at least, and what is left over at the end an eighth at most. */
static uint32_t span_pages(unsigned class)
{
	uint32_t n = (uint32_t)((8 * sizes[class] + PAGE - 1) / PAGE);
	for (n = n < 4 ? 4 : n; n * PAGE % sizes[class] > n * PAGE / 8; n++)
		;
	return n;
}

/* Shared by all threads: the spans of a class that have free blocks. */
static struct central {
	pthread_mutex_t lock;
	uint32_t spans;
	char pad[20]; /* a line of its own */
} __attribute__((aligned(64))) central[CLASSES];

struct block {
	struct block *next;
};

/* What a thread keeps at hand. */
static __thread struct cache {
	struct bin {
		struct block *blocks;
		uint32_t count, max;
	} bin[CLASSES];
	bool registered;
} cache;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void flush_all(void *unused);
static void make_key(void) { pthread_key_create(&key, flush_all); }

static void span_link(struct central *c, uint32_t s)
{
	struct page *p = &H.page[s];
	p->listed = true, p->prev = 0, p->next = c->spans;
	if (c->spans)
		H.page[c->spans].prev = s;
	c->spans = s;
}

static void span_unlink(struct central *c, uint32_t s)
{
	struct page *p = &H.page[s];
	p->listed = false;
	if (p->prev)
		H.page[p->prev].next = p->next;
	else
		c->spans = p->next;
	if (p->next)
		H.page[p->next].prev = p->prev;
}

/* A new span of a class, its blocks chained. The lock of the class is held. */
static uint32_t span_new(unsigned class)
{
	uint32_t pages = span_pages(class), s = scmp_span(pages, 1);
	if (!s)
		return 0;
	uint32_t total = (uint32_t)(pages * PAGE / sizes[class]);
	for (uint32_t i = 0; i < pages; i++) {
		H.page[s + i].kind = PAGE_SMALL;
		H.page[s + i].class = (uint8_t)class;
		H.page[s + i].first = s;
	}
	struct page *p = &H.page[s];
	p->used = 0, p->total = (uint16_t)total;
	struct block *list = NULL;
	for (uint32_t i = total; i-- > 0;) {
		struct block *b = (struct block *)(void *)((uint8_t *)scmp_addr(s) + (size_t)i * sizes[class]);
		b->next = list;
		list = b;
	}
	p->blocks = list;
	return s;
}

/* Fills a bin of this thread. More each time, up to 64 KiB, so that threads that allocate little keep little. */
static bool refill(unsigned class)
{
	struct central *c = &central[class];
	struct bin *b = &cache.bin[class];
	uint32_t most = (64u << 10) / sizes[class];
	b->max = b->max ? (b->max * 2 < most ? b->max * 2 : most) : 4;
	if (b->max < 2)
		b->max = 2;
	uint32_t want = b->max / 2;
	pthread_mutex_lock(&c->lock);
	while (want > 0) {
		uint32_t s = c->spans;
		if (!s) {
			if (!(s = span_new(class)))
				break;
			span_link(c, s);
		}
		struct page *p = &H.page[s];
		while (want > 0 && p->blocks) {
			struct block *k = p->blocks;
			p->blocks = k->next;
			p->used++;
			k->next = b->blocks;
			b->blocks = k;
			b->count++;
			want--;
		}
		if (!p->blocks)
			span_unlink(c, s);
	}
	pthread_mutex_unlock(&c->lock);
	if (!cache.registered && b->count) {
		cache.registered = true; /* before what follows, which may allocate */
		pthread_once(&once, make_key);
		pthread_setspecific(key, &cache);
	}
	return b->count > 0;
}

/* Gives n blocks of a bin back to their spans, and spans of which nothing is used to the pages. */
static void drain(unsigned class, uint32_t n)
{
	struct central *c = &central[class];
	struct bin *b = &cache.bin[class];
	pthread_mutex_lock(&c->lock);
	for (; n > 0 && b->blocks; n--) {
		struct block *k = b->blocks;
		b->blocks = k->next;
		b->count--;
		uint32_t s = H.page[scmp_page_of(k)].first;
		struct page *p = &H.page[s];
		k->next = p->blocks;
		p->blocks = k;
		if (!p->listed)
			span_link(c, s);
		if (--p->used == 0) {
			span_unlink(c, s);
			for (uint32_t i = 0; i < p->len; i++)
				H.page[s + i].kind = PAGE_NONE;
			scmp_span_free(s);
		}
	}
	pthread_mutex_unlock(&c->lock);
}

static void flush_all(void *unused)
{
	(void)unused;
	cache.registered = false; /* destructors that run later may allocate again */
	for (unsigned i = 0; i < CLASSES; i++) {
		drain(i, UINT32_MAX);
		cache.bin[i].max = 0;
	}
}

void scmp_lock_all(void)
{
	for (unsigned i = 0; i < CLASSES; i++)
		pthread_mutex_lock(&central[i].lock);
	pthread_mutex_lock(&H.lock);
}

void scmp_unlock_all(bool child)
{
	if (child) { /* the owner's thread is another one now */
		pthread_mutex_init(&H.lock, NULL);
		for (unsigned i = 0; i < CLASSES; i++)
			pthread_mutex_init(&central[i].lock, NULL);
		return;
	}
	pthread_mutex_unlock(&H.lock);
	for (unsigned i = 0; i < CLASSES; i++)
		pthread_mutex_unlock(&central[i].lock);
}

/* While the heap is set up, what that needs comes from here; it is never given back. Each block is preceded by its size. */
#define EARLY (64ul << 20)
static uint8_t *early;
static size_t early_used;

static void *early_alloc(size_t n)
{
	if (!early) {
		void *p = mmap(NULL, EARLY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p == MAP_FAILED)
			return NULL;
		early = p;
	}
	size_t need = 16 + ((n + 15) & ~15ul), at = __atomic_fetch_add(&early_used, n < EARLY ? need : 0, __ATOMIC_RELAXED);
	if (n >= EARLY || at + need > EARLY)
		return NULL;
	*(size_t *)(void *)(early + at) = n;
	return early + at + 16;
}

static bool is_early(const void *p) { return early && (uintptr_t)p - (uintptr_t)early < EARLY; }

static void *full(void)
{
	errno = ENOMEM;
	return NULL;
}

static void *large(size_t n, size_t align)
{
	if (n > (size_t)H.pages * PAGE || align > (size_t)H.pages * PAGE)
		return full();
	uint32_t s = scmp_span((uint32_t)((n + PAGE - 1) / PAGE), align > PAGE ? (uint32_t)(align / PAGE) : 1);
	return s ? scmp_addr(s) : full();
}

static void *slow(size_t n)
{
	if (!scmp_ready())
		return early_alloc(n);
	if (n > SMALL_MAX)
		return large(n, 0);
	struct bin *b = &cache.bin[class_of(n)];
	if (!b->blocks && !refill(class_of(n)))
		return full();
	struct block *k = b->blocks;
	b->blocks = k->next;
	b->count--;
	return k;
}

API void *malloc(size_t n)
{
	if (n <= SMALL_MAX) {
		struct bin *b = &cache.bin[class_of(n)];
		struct block *k = b->blocks;
		if (k) {
			b->blocks = k->next;
			b->count--;
			return k;
		}
	}
	return slow(n);
}

static void die(const char *what)
{
	static const char head[] = "libscm_preload: ";
	if (write(2, head, sizeof(head) - 1) < 0 || write(2, what, strlen(what)) < 0 || write(2, "\n", 1) < 0)
		_exit(134);
	__builtin_trap();
}

API void free(void *p)
{
	if (!p || is_early(p))
		return;
	if (!scmp_ours(p)) /* not from malloc of this program: the dynamic linker's own, from before the heap was there */
		return;
	uint32_t i = scmp_page_of(p);
	int saved = errno; /* free must leave it alone (POSIX.1-2024) */
	struct page *g = &H.page[i];
	if (g->kind == PAGE_SMALL) {
		struct bin *b = &cache.bin[g->class];
		struct block *k = p;
		k->next = b->blocks;
		b->blocks = k;
		if (++b->count > b->max) {
			if (!cache.registered) { /* a thread that only frees must give back at its end, too */
				cache.registered = true;
				pthread_once(&once, make_key);
				pthread_setspecific(key, &cache);
			}
			if (b->max < 8)
				b->max = 8;
			if (b->count > b->max)
				drain(g->class, b->count - b->max / 2);
		}
	} else if (g->kind == PAGE_LARGE && g->first == i && p == scmp_addr(i)) {
		scmp_span_free(i);
	} else {
		die("free() of an address that is no allocated block");
	}
	errno = saved;
}

API size_t malloc_usable_size(void *p)
{
	if (!p)
		return 0;
	if (is_early(p))
		return *(size_t *)(void *)((uint8_t *)p - 16);
	if (!scmp_ours(p))
		return 0;
	struct page *g = &H.page[scmp_page_of(p)];
	return g->kind == PAGE_SMALL ? sizes[g->class] : (size_t)g->len * PAGE;
}

/* A page that a large block has had before may hold anything; only what was never used is known to be zero, and only in a fresh file. */
API void *calloc(size_t a, size_t b)
{
	size_t n;
	if (__builtin_mul_overflow(a, b, &n))
		return full();
	void *p = malloc(n);
	if (p)
		memset(p, 0, n);
	return p;
}

API void *realloc(void *p, size_t n)
{
	if (!p)
		return malloc(n);
	if (n == 0) { /* as glibc does */
		free(p);
		return NULL;
	}
	size_t have = malloc_usable_size(p);
	if (scmp_ours(p)) {
		uint32_t i = scmp_page_of(p);
		struct page *g = &H.page[i];
		if (g->kind == PAGE_SMALL) {
			if (n <= have && (n > have / 2 || have <= 64))
				return p;
		} else if (n > SMALL_MAX) {
			if (n > (size_t)H.pages * PAGE)
				return full();
			uint32_t pages = (uint32_t)((n + PAGE - 1) / PAGE);
			if (pages <= g->len) {
				scmp_span_shrink(i, pages);
				return p;
			}
			if (scmp_span_grow(i, pages))
				return p;
		}
	}
	void *q = malloc(n);
	if (q) {
		memcpy(q, p, have < n ? have : n);
		free(p);
	}
	return q;
}

API void *reallocarray(void *p, size_t a, size_t b)
{
	size_t n;
	return __builtin_mul_overflow(a, b, &n) ? full() : realloc(p, n);
}

/* Spans begin at a page, so a block is aligned to whatever its class size is a multiple of. */
API void *memalign(size_t align, size_t n)
{
	if (align & (align - 1)) {
		errno = EINVAL;
		return NULL;
	}
	if (align <= 16)
		return malloc(n);
	if (n <= SMALL_MAX && align <= PAGE)
		for (unsigned c = class_of(n < align ? align : n); c < CLASSES; c++)
			if (sizes[c] % align == 0)
				return malloc(sizes[c]);
	if (!scmp_ready())
		return full();
	return large(n ? n : 1, align);
}

API void *aligned_alloc(size_t align, size_t n) { return memalign(align, n); }

API int posix_memalign(void **out, size_t align, size_t n)
{
	if (align < sizeof(void *) || (align & (align - 1)))
		return EINVAL;
	int saved = errno;
	void *p = memalign(align, n);
	errno = saved;
	if (!p)
		return ENOMEM;
	*out = p;
	return 0;
}

API void *valloc(size_t n) { return memalign(PAGE, n); }
API void *pvalloc(size_t n) { return memalign(PAGE, (n + PAGE - 1) & ~(PAGE - 1)); }
API void cfree(void *p) { free(p); }
