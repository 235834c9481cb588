/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The scenarios of the crash test, and recovery on demand.
 *   trace-tool list                          names of scenarios
 *   trace-tool record NAME START TRACE       START: the image before; TRACE: what was done to it (src/trace.c)
 *   trace-tool serve IMAGE TRACE             for each byte of input: recover the image in place ('r'), traced ('t'); answers a line
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "internal.h"
#include "trace.h"

static scm_region *region;

static struct cells *root(void)
{
	void *p;
	TRY(scm_root(region, sizeof(struct cells), 0, &p));
	return p;
}

static scm_tx *begin(void)
{
	scm_tx *t;
	TRY(scm_tx_begin(region, &t));
	return t;
}

static void bump(scm_tx *t, uint64_t by, int from, int to)
{
	struct cells *c = root();
	struct scm_range rs[12];
	for (int i = from; i < to; i++)
		rs[i - from] = (struct scm_range){&c->a[i].v, 8};
	TRY(scm_tx_add_ranges(t, rs, (size_t)(to - from)));
	for (int i = from; i < to; i++)
		c->a[i].v += by;
}

static void put(scm_tx *t, int i, size_t n, int fill)
{
	struct cells *c = root();
	void *p;
	TRY(scm_tx_alloc(t, n, &p));
	memset(p, fill, n);
	TRY(scm_tx_add(t, &c->block[i], 8));
	c->block[i] = scm_offset(region, p);
}

static void drop(scm_tx *t, int i)
{
	struct cells *c = root();
	TRY(scm_tx_free(t, scm_ptr(region, c->block[i])));
	TRY(scm_tx_add(t, &c->block[i], 8));
	c->block[i] = 0;
}

static void commit(scm_tx *t) { TRY(scm_tx_commit(t)); }
static void undo(scm_tx *t) { TRY(scm_tx_abort(t)); }

/* update */
static void op_ten(void) { scm_tx *t = begin(); bump(t, 3, 0, 10); commit(t); }
static void op_twice(void) { scm_tx *t = begin(); bump(t, 5, 0, 3); bump(t, 7, 2, 4); commit(t); }
static void op_abort(void) { scm_tx *t = begin(); bump(t, 9, 1, 3); undo(t); }
static void op_other(void) { scmi_trace_agent(1); scm_tx *t = begin(); bump(t, 11, 1, 3); commit(t); }
static void op_empty(void) { commit(begin()); }

/* long log */
static void wide(scm_tx *t, uint64_t v)
{
	struct cells *c = root();
	TRY(scm_tx_add(t, c->wide, sizeof(c->wide)));
	for (uint64_t i = 0; i < 400; i++)
		c->wide[i] = v * (i + 1);
}
static void op_wide(void) { scm_tx *t = begin(); wide(t, 1); bump(t, 1, 0, 1); commit(t); }
static void op_wide_abort(void) { scm_tx *t = begin(); wide(t, 9); bump(t, 1, 0, 1); undo(t); }
static void op_log_is_data(void) { scm_tx *t = begin(); put(t, 0, 20 << 10, 0x11); commit(t); }

/* persist */
static void make_bulk(void) { TRY(scm_alloc_to(region, &root()->bulk, 3000)); }
static void op_poke(void) { struct cells *c = root(); c->a[0].v = 1; TRY(scm_persist(region, &c->a[0].v, 8)); }
static void op_poke2(void) { struct cells *c = root(); c->a[1].v = 2; TRY(scm_flush(region, &c->a[1].v, 8)); TRY(scm_drain(region)); }
static void op_nt(void) /* data past the cache, then the word that makes it count */
{
	struct cells *c = root();
	uint8_t src[2980], *to = scm_ptr(region, c->bulk);
	for (size_t i = 0; i < sizeof(src); i++)
		src[i] = (uint8_t)("0123456789abcdef"[i % 16]);
	TRY(scm_copy_nt(region, to + 3, src, 2890));
	TRY(scm_copy_nt(region, to + 2975, src, 5));
	TRY(scm_drain(region));
	c->flag = 1;
	TRY(scm_persist(region, &c->flag, 8));
}

/* alloc: chunks that become runs and logs hold rubbish */
static void rubbish(void)
{
	void *p[8];
	scm_tx *t;
	root();
	t = begin();
	for (int i = 0; i < 8; i++) {
		TRY(scm_tx_alloc(t, 16 << 10, &p[i]));
		memset(p[i], 0xff, 16 << 10);
	}
	commit(t);
	t = begin();
	for (int i = 0; i < 8; i++)
		TRY(scm_tx_free(t, p[i]));
	commit(t);
}
static void op_alloc(void) { scm_tx *t = begin(); put(t, 0, 40, 0x22); commit(t); }
static void op_alloc2(void) { scm_tx *t = begin(); put(t, 1, 40, 0x33); put(t, 2, 100, 0x44); commit(t); }
static void op_free(void) { scm_tx *t = begin(); drop(t, 0); commit(t); }
static void op_free_abort(void) { scm_tx *t = begin(); drop(t, 1); put(t, 0, 40, 0x55); undo(t); }
static void op_both(void) { scm_tx *t = begin(); put(t, 3, 40, 0x66); drop(t, 3); bump(t, 1, 0, 1); commit(t); }
static void op_large(void) { scm_tx *t = begin(); put(t, 4, 30 << 10, 0x77); commit(t); }
static void op_large_free(void) { scm_tx *t = begin(); drop(t, 4); put(t, 5, 64, 0x88); commit(t); }
static void op_unlogged(void) /* an allocation that nothing but the commit logs */
{
	struct cells *c = root();
	scm_tx *t = begin();
	void *p;
	TRY(scm_tx_add(t, &c->block[0], 8));
	TRY(scm_tx_alloc(t, 48, &p));
	c->block[0] = scm_offset(region, p);
	commit(t);
}
static void op_dirty(void) /* a slot that nothing refers to is written without undo, then the word that makes it count */
{
	struct cells *c = root();
	scm_tx *t = begin();
	uint8_t *p = scm_ptr(region, c->bulk);
	TRY(scm_tx_dirty(t, p, 2980));
	memset(p, 0x5a, 2980);
	TRY(scm_tx_add(t, &c->flag, 8));
	c->flag = 1;
	commit(t);
}

/* full: every chunk a run, all but the root's empty */
static void make_full(void)
{
	static const size_t sizes[] = {2000, 100};
	for (int i = 0; i < 2; i++) {
		scm_tx *t = begin();
		put(t, 0, sizes[i], 0xff);
		commit(t);
		t = begin();
		drop(t, 0);
		commit(t);
	}
}
static void op_reclaim(void) { scm_tx *t = begin(); put(t, 0, 16 << 10, 0xff); commit(t); }
static void op_full(void)
{
	scm_tx *t = begin();
	void *p;
	bump(t, 1, 0, 1);
	CHECK(scm_tx_alloc(t, 60 << 10, &p) == SCM_E_FULL);
	undo(t);
}

/* free on full: no chunk is free but what is kept back, and blocks in so many words that a lane has no room to log their frees */
static scm_off sparse[4096];
static size_t nsparse;
static void make_sparse(void)
{
	void *p;
	size_t n = 0;
	root();
	scm_tx *t = begin();
	while (n < sizeof(sparse) / sizeof(*sparse) && !scm_tx_alloc(t, 32, &p))
		sparse[n++] = scm_offset(region, p);
	commit(t);
	t = begin();
	for (size_t i = 0; i < n; i++) {
		if (i % 50 == 0)
			sparse[nsparse++] = sparse[i];
		else
			TRY(scm_tx_free(t, scm_ptr(region, sparse[i])));
	}
	commit(t);
}
static scm_tx *free_sparse(void)
{
	scm_tx *t = begin();
	for (size_t i = 0; i < nsparse; i++)
		TRY(scm_tx_free(t, scm_ptr(region, sparse[i])));
	return t;
}
static void op_free_sparse(void) { commit(free_sparse()); }
static void op_free_sparse_abort(void) { undo(free_sparse()); }

/* two lanes: a transaction within the life of another, on blocks that share a word of a bitmap */
static void overlap(bool keep)
{
	struct cells *c = root();
	scm_tx *outer = begin();
	void *a;
	TRY(scm_tx_alloc(outer, 64, &a));
	scmi_trace_agent(1);
	scm_tx *inner = begin();
	put(inner, 1, 64, 0x12);
	bump(inner, 1, 3, 4);
	commit(inner);
	scmi_trace_mark();
	scmi_trace_agent(0);
	TRY(scm_tx_add(outer, &c->block[0], 8));
	memset(a, 0x34, 64);
	c->block[0] = scm_offset(region, a);
	if (keep)
		commit(outer);
	else
		undo(outer);
}
static void op_overlap(void) { overlap(true); }
static void op_overlap_abort(void) { overlap(false); }

static void make_root(void) { root(); }

static const struct scenario {
	const char *name;
	uint64_t size;
	void (*setup)(void); /* NULL: from zeros */
	void (*ops[10])(void);
} scenarios[] = {
	{"format", 64 << 10, NULL, {make_root, op_empty}},
	{"update", 64 << 10, make_root, {op_ten, op_twice, op_abort, op_other, op_ten}},
	{"long log", 128 << 10, make_root, {op_wide, op_wide_abort, op_log_is_data}},
	{"persist", 64 << 10, make_bulk, {op_poke, op_poke2, op_nt}},
	{"dirty", 64 << 10, make_bulk, {op_dirty}},
	{"alloc", 256 << 10, rubbish, {op_alloc, op_alloc2, op_free, op_free_abort, op_both, op_large, op_large_free, op_unlogged}},
	{"full", 64 << 10, make_full, {op_reclaim, op_full, op_abort}},
	{"free on full", 128 << 10, make_sparse, {op_free_sparse_abort, op_free_sparse}},
	{"two lanes", 64 << 10, make_root, {op_overlap, op_overlap_abort}},
};
#define NSCENARIOS (sizeof(scenarios) / sizeof(scenarios[0]))

static const struct scm_options small = {.flags = SCM_OPEN_CREATE, .lanes = 2, .lane_size = 1024, .chunk_size = 16 << 10};

static void open_image(void *img, uint64_t size)
{
	region = scmi_image_open(img, size, &small);
	if (!region)
		TRY(SCM_E_CORRUPT);
}

static int record(const struct scenario *s, const char *start, const char *trace)
{
	uint8_t *img = mmap(NULL, s->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (s->setup) {
		open_image(img, s->size);
		s->setup();
		TRY(scm_close(region));
	}
	int fd = open(start, O_WRONLY | O_CREAT | O_TRUNC, 0600), to = open(trace, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0 && to >= 0 && write(fd, img, s->size) == (ssize_t)s->size);
	close(fd);
	scmi_trace_start(to);
	open_image(img, s->size);
	scmi_trace_mark();
	for (int i = 0; s->ops[i]; i++) {
		s->ops[i]();
		scmi_trace_mark();
	}
	TRY(scm_close(region));
	scmi_trace_mark();
	scmi_trace_stop();
	return 0;
}

static int serve(const char *image, const char *trace)
{
	int fd = open(image, O_RDWR), to = open(trace, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	struct stat st;
	CHECK(fd >= 0 && to >= 0 && !fstat(fd, &st));
	uint64_t size = (uint64_t)st.st_size;
	uint8_t *img = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	char cmd;
	while (read(0, &cmd, 1) == 1) {
		if (cmd == 't') {
			CHECK(!ftruncate(to, 0) && lseek(to, 0, SEEK_SET) == 0);
			scmi_trace_start(to);
		}
		scm_region *r = scmi_image_open(img, size, &small);
		scmi_trace_stop();
		char line[1024];
		int n = snprintf(line, sizeof(line), "%s\n", r ? "ok" : scm_errormsg());
		if (r)
			scmi_detach(r); /* as it is after recovery: not closed */
		if (write(1, line, (size_t)n) != n)
			return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "list")) {
		for (size_t i = 0; i < NSCENARIOS; i++)
			printf("%s\n", scenarios[i].name);
		return 0;
	}
	if (argc == 4 && !strcmp(argv[1], "serve"))
		return serve(argv[2], argv[3]);
	for (size_t i = 0; argc == 5 && !strcmp(argv[1], "record") && i < NSCENARIOS; i++)
		if (!strcmp(argv[2], scenarios[i].name))
			return record(&scenarios[i], argv[3], argv[4]);
	fprintf(stderr, "usage: trace-tool list | record NAME START TRACE | serve IMAGE TRACE\n");
	return 2;
}
