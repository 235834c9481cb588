/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What the parts of libscm share. The format is that of docs/scm.md; names follow it. */
#ifndef SCM_INTERNAL_H
#define SCM_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "scm.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the format is little endian, and this library reads it as it lies in memory"
#endif

#define SCM_LINE 64u
#define HEADER_SIZE 4096u
#define HEADER_LEN 512u
#define ROOT_AT (2u * HEADER_SIZE)
#define LANES_AT (3u * HEADER_SIZE)
#define MIN_SIZE (64ull << 10)
#define MAX_SIZE (1ull << 46)
#define NCLASSES 38

static inline uint64_t min64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) & ~(to - 1); }

/* error.c */
int scmi_error(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int scmi_prefix(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3))); /* puts text before the message */
uint32_t scmi_crc32c(const void *p, size_t n);

/* mem.c: memory and how its stores become durable. Offsets are not checked here. */
enum way { WAY_LINES, WAY_FENCE_ONLY, WAY_PAGES };
enum insn { INSN_NONE, INSN_CLFLUSH, INSN_CLFLUSHOPT, INSN_CLWB, INSN_CVAC, INSN_CVAP, INSN_CVADP };

struct mem {
	uint8_t *base;
	uint64_t size;
	enum way way;
	enum insn insn;
	pthread_mutex_t lock; /* of what follows; held while the kernel writes, so that others whose pages it takes wait */
	uint64_t lo, hi;      /* what msync has to write */
	int err;              /* errno of the msync that failed: the kernel may have dropped the pages */
};

void scmi_mem_init(struct mem *m, void *base, uint64_t size, enum way way);
enum insn scmi_best(void);
const char *scmi_insn_name(enum insn i);
void scmi_flush(struct mem *m, uint64_t off, uint64_t n);
int scmi_fence(struct mem *m);
void scmi_copy_nt(struct mem *m, uint64_t off, const void *src, uint64_t n);

/* trace.c records the stream for tests and leaves out one site on demand. In the real library none of it is there. */
#ifdef SCM_TRACE
#define SCM_STR2(x) #x
#define SCM_STR(x) SCM_STR2(x)
#define SITE __FILE__ ":" SCM_STR(__LINE__)
void scmi_trace_attach(struct mem *m);
void scmi_trace_store(struct mem *m, char kind, uint64_t off, uint64_t n);
bool scmi_trace_flush(struct mem *m, uint64_t off, uint64_t n, const char *site);
bool scmi_trace_fence(struct mem *m, const char *site);
bool scmi_trace_verify(bool ok, const char *site);
#define TRACE_STORE(m, kind, off, n) scmi_trace_store(m, kind, off, n)
#define mem_flush(m, off, n) (scmi_trace_flush(m, off, n, SITE) ? scmi_flush(m, off, n) : (void)0)
#define mem_fence(m) (scmi_trace_fence(m, SITE) ? scmi_fence(m) : 0)
#define verify(ok) scmi_trace_verify(ok, SITE)
#else
#define TRACE_STORE(m, kind, off, n) ((void)0)
#define mem_flush(m, off, n) scmi_flush(m, off, n)
#define mem_fence(m) scmi_fence(m)
#define verify(ok) (ok)
#endif

static inline uint64_t mem_load64(const struct mem *m, uint64_t off)
{
	return __atomic_load_n((const uint64_t *)(const void *)(m->base + off), __ATOMIC_RELAXED);
}
/* The largest store that no crash tears. */
static inline void mem_store64(struct mem *m, uint64_t off, uint64_t v)
{
	__atomic_store_n((uint64_t *)(void *)(m->base + off), v, __ATOMIC_RELEASE);
	TRACE_STORE(m, 'S', off, 8);
}
static inline void mem_or64(struct mem *m, uint64_t off, uint64_t mask)
{
	__atomic_fetch_or((uint64_t *)(void *)(m->base + off), mask, __ATOMIC_SEQ_CST);
	TRACE_STORE(m, 'S', off, 8);
}
static inline void mem_andnot64(struct mem *m, uint64_t off, uint64_t mask)
{
	__atomic_fetch_and((uint64_t *)(void *)(m->base + off), ~mask, __ATOMIC_SEQ_CST);
	TRACE_STORE(m, 'S', off, 8);
}
static inline void mem_copy(struct mem *m, uint64_t off, const void *p, uint64_t n)
{
	memcpy(m->base + off, p, n);
	TRACE_STORE(m, 'C', off, n);
}
static inline void mem_zero(struct mem *m, uint64_t off, uint64_t n)
{
	memset(m->base + off, 0, n);
	TRACE_STORE(m, 'C', off, n);
}

/* layout.c */
struct geometry {
	uint64_t size, lanes_off;
	uint32_t lanes, lane_size;
	uint64_t table_off, heap_off;
	uint32_t chunk_size, chunk_count;
};
extern const uint32_t scmi_class_sizes[NCLASSES];
int scmi_geometry_new(struct geometry *g, uint64_t size, const struct scm_options *o);
const char *scmi_geometry_check(const struct geometry *g); /* what the format does not allow, or NULL */
int scmi_class_of(const struct geometry *g, uint64_t n);   /* -1: needs chunks of its own */

static inline uint64_t geo_heap_end(const struct geometry *g) { return g->heap_off + (uint64_t)g->chunk_count * g->chunk_size; }
static inline uint64_t geo_lane(const struct geometry *g, uint32_t i) { return g->lanes_off + (uint64_t)i * g->lane_size; }
static inline uint64_t geo_word(const struct geometry *g, uint32_t c) { return g->table_off + 8ull * c; }
static inline uint64_t geo_chunk(const struct geometry *g, uint32_t c) { return g->heap_off + (uint64_t)c * g->chunk_size; }
static inline uint64_t geo_bitmap(const struct geometry *g) { return g->chunk_size / 256; }
static inline uint32_t geo_chunk_of(const struct geometry *g, uint64_t off) { return (uint32_t)((off - g->heap_off) / g->chunk_size); }
static inline uint32_t geo_blocks(const struct geometry *g, unsigned class)
{
	return (uint32_t)((g->chunk_size - geo_bitmap(g)) / scmi_class_sizes[class]);
}
static inline bool geo_within(uint64_t off, uint64_t n, uint64_t lo, uint64_t hi) { return off >= lo && n <= hi - lo && off <= hi - n; }
static inline bool geo_in_heap(const struct geometry *g, uint64_t off, uint64_t n)
{
	return geo_within(off, n, g->heap_off, geo_heap_end(g));
}

enum { CHUNK_FREE, CHUNK_RUN, CHUNK_LARGE };
static inline uint64_t chunk_word(uint64_t kind, uint64_t class, uint64_t count) { return kind | class << 8 | count << 32; }

/* header.c */
enum { STATE_CLOSED = 1, STATE_OPEN = 2, INCOMPAT_VOLATILE = 1, INCOMPAT_KNOWN = 1 };
struct header {
	uint32_t incompat, compat;
	struct geometry geo;
	uint8_t uuid[16], parent[16];
	char layout[65];
	uint64_t base, seq, generation;
	uint32_t state;
	uint64_t host_usc, seen_usc;
	uint8_t host_dev[16];
};
int scmi_header_read(struct mem *m, struct header *h, bool *stale_a, bool *healed);
int scmi_header_write(struct mem *m, struct header *h);
int scmi_header_heal(struct mem *m, const struct header *h);
int scmi_header_format(struct mem *m, const struct header *h);
uint64_t scmi_header_base(const uint8_t copies[2][HEADER_LEN]); /* the wish for an address, before anything is mapped */
bool scmi_blank(const struct mem *m);

/* log.c */
enum { OP_UNDO = 1, OP_SET, OP_CLEAR, OP_LINK, REC_HEAD = 32 };
struct entry {
	uint8_t op;
	uint64_t off, arg;
	const uint8_t *payload;
};
struct lane_log {
	struct entry *es;
	size_t count, cap;
	void **bufs; /* what the payloads lie in */
	size_t nbufs;
};
uint64_t scmi_salt(const uint8_t uuid[16], uint32_t lane);
size_t scmi_entry(uint8_t *b, uint8_t op, uint64_t off, uint64_t arg, const void *payload, uint64_t n); /* returns its length */
void scmi_record_end(uint8_t *b, uint32_t len, uint64_t gen, uint32_t seq, uint32_t count, uint64_t salt);
bool scmi_undoable(const struct geometry *g, uint64_t off, uint64_t n);
int scmi_lane_read(scm_region *r, uint32_t lane, struct lane_log *out);
void scmi_lane_log_free(struct lane_log *l);
void scmi_undo(scm_region *r, const struct lane_log *l);
int scmi_recover(scm_region *r, bool stale_a);

/* heap.c */
struct run {
	uint32_t chunk, nfree, hint, words;
	uint8_t class;
	bool loaded, listed;
	uint64_t *used;    /* allocated or reserved */
	uint64_t *freeing; /* by transactions that have not ended */
	struct run *prev, *next;
};
/* How much is kept back for the log of a commit: room.c. It follows from the geometry. */
struct room {
	uint64_t tail;    /* bytes at the end of a segment of the log that only the commit uses */
	uint64_t entries; /* bytes of entries for which the tail is enough */
	uint64_t record;  /* least bytes of entries in a record that is full */
	uint64_t records; /* such records that a chunk holds */
};
struct heap {
	pthread_mutex_t borrowing; /* held by the commit that may use what is kept back; before lock */
	pthread_mutex_t lock;
	uint8_t *kind; /* of each chunk */
	struct run **runs;
	uint32_t free, hint, lent; /* lent: chunks that a commit has borrowed for its log */
	uint64_t entries;          /* bytes of the log that the largest commit needs */
	struct room room;
	struct run *partial[NCLASSES];
};
/* What a transaction does to the allocator when it commits. */
struct alloc_op {
	uint8_t op; /* OP_SET, OP_CLEAR, or OP_UNDO for a word of the chunk table */
	bool undone, freeable;
	uint32_t chunks;
	uint64_t at, val, block, n;
	struct run *run;
};
int scmi_heap_new(scm_region *r, const uint64_t *table);
void scmi_heap_free(scm_region *r);
int scmi_heap_alloc(scm_region *r, uint64_t n, struct alloc_op *op);
int scmi_heap_take(scm_region *r, uint32_t count, uint32_t *chunk); /* the lock is not held */
bool scmi_heap_borrow(scm_region *r, uint32_t *chunk); /* one of those that are kept back, for the log of a commit */
void scmi_heap_return(scm_region *r, const struct alloc_op *ext, size_t n, uint32_t lent);
void scmi_heap_release(scm_region *r, const struct alloc_op *op);
void scmi_heap_settle(scm_region *r, const struct alloc_op *op);
int scmi_heap_start_free(scm_region *r, uint64_t off, struct alloc_op *op);
void scmi_heap_end_free(scm_region *r, const struct alloc_op *op);

/* room.c */
enum { TABLE_ENTRY = 16 + 8 }; /* bytes of the log: one UNDO for a word of the chunk table */
struct room scmi_room(const struct geometry *g);
uint32_t scmi_max_record(const struct geometry *g);
uint64_t scmi_run_entries(const struct geometry *g, uint8_t class); /* bytes of the log that a commit needs for a run */
uint32_t scmi_heap_keep(const struct heap *h, uint64_t grow);
uint64_t scmi_heap_free_bytes(const scm_region *r);
bool scmi_heap_available(const struct heap *h, uint32_t count, uint64_t grow);

/* tx.c */
struct word_op {
	uint64_t at, mask;
	uint8_t op;
};
struct span {
	uint64_t off, n;
};
struct scm_tx {
	scm_region *r;
	scm_tx *next; /* of the free ones */
	uint32_t lane, seq, count;
	uint64_t salt, gen, pos, end;
	bool live;
	uint8_t *buf;
	uint32_t len, max;
	struct alloc_op *ops;
	size_t nops, cap_ops, logged;
	struct span *spans;
	size_t nspans, cap_spans;
	struct alloc_op *ext;
	size_t next_ext, cap_ext;
	struct word_op *words; /* scratch */
	size_t cap_words;
	uint32_t lent; /* how many of ext are of those that are kept back */
	bool borrows;  /* it holds heap.borrowing */
};
int scmi_tx_log(scm_tx *t, const struct span *ss, size_t n);
int scmi_tx_settle_ops(scm_tx *t);
int scmi_tx_reserve(void *array, size_t *cap, size_t need, size_t elem); /* array: pointer to the pointer */

/* probe.c */
struct verdict {
	uint32_t gran, dur;
	bool forced, dax, map_sync, eadr;
	char fstype[32], why[384], mount[256];
};
void scmi_probe(int fd, const char *path, bool map_sync, uint32_t mode, struct verdict *v);
int scmi_verdict_override(struct verdict *v);
int scmi_verdict_satisfies(const struct verdict *v, const struct scm_options *o);
const char *scmi_mode_name(uint32_t mode);

/* env.c */
int scmi_mode_parse(const char *s, uint32_t *mode);
int scmi_size_parse(const char *s, uint64_t *size);
int scmi_env(const char **path, struct scm_options *o); /* fills in path and o; path NULL: dram */

/* guard.c: SIGBUS as an error */
struct guard {
	sigjmp_buf env;
	struct guard *prev;
	scm_region *r;
	uint64_t fault;
};
extern _Thread_local struct guard *scmi_guard_top __attribute__((tls_model("initial-exec")));
extern _Thread_local pthread_mutex_t *scmi_held __attribute__((tls_model("initial-exec")));
int scmi_guarded(scm_region *r, int (*fn)(void *), void *arg);
int scmi_media_error(struct guard *g);
void scmi_guard_install(void);

/* region.c */
struct scm_region {
	struct mem mem;
	struct header hdr;
	struct geometry geo;
	struct heap heap;
	pthread_mutex_t lock; /* of the free transactions, and of the root */
	pthread_cond_t freed;
	scm_tx *txs, *tx_free;
	uint32_t tx_idle;
	bool read_only, healed, moved;
	uint32_t recovered, mode;
	struct verdict v;
	char *path;
	int fd;
	uint64_t base_wish;
	_Atomic int failed; /* enum scm_error, once it has */
	char failure[256];
	scm_region *next; /* of all open regions: for fork */
};
int scmi_attach(scm_region *r, const struct scm_options *o); /* r->mem, path, read_only are set */
void scmi_detach(scm_region *r);
int scmi_broken(scm_region *r);
int scmi_fail(scm_region *r, int code);
void scmi_regions_add(scm_region *r);
void scmi_regions_remove(scm_region *r);
scm_region *scmi_image_open(void *b, uint64_t size, const struct scm_options *o); /* memory of the caller; changes it */
static inline int region_fenced(scm_region *r, int err) { return err ? scmi_fail(r, err) : 0; }
#define region_fence(r) region_fenced(r, mem_fence(&(r)->mem))

#endif
