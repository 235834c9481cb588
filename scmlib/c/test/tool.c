/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What the tests in Go run: one command a process. */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "internal.h"

static scm_region *open_at(const char *path, const struct scm_options *o)
{
	scm_region *r;
	TRY(scm_open(&r, path, o));
	return r;
}

static struct cells *root_of(scm_region *r)
{
	void *p;
	TRY(scm_root(r, sizeof(struct cells), 0, &p));
	return p;
}

static int print_block(scm_off off, uint64_t size, void *arg)
{
	(void)arg;
	printf("block %llu %llu\n", (unsigned long long)off, (unsigned long long)size);
	return 0;
}

/* open PATH LAYOUT FLAGS SIZE GRANULARITY DURABILITY MODE: opens, says what it found, closes. */
static int cmd_open(char **a)
{
	struct scm_options o = {.layout = a[1], .flags = (uint32_t)atoi(a[2]), .size = strtoull(a[3], NULL, 10), .require_granularity = (uint32_t)atoi(a[4]),
		.require_durability = (uint32_t)atoi(a[5]), .mode = (uint32_t)atoi(a[6])};
	scm_region *r = open_at(*a[0] ? a[0] : NULL, &o);
	struct scm_info i;
	TRY(scm_info(r, &i));
	printf("info %s|%u|%u|%llu|%llu|%u|%u|%s|%s|%s\n", i.layout, i.granularity, i.durability, (unsigned long long)i.size,
	       (unsigned long long)i.generation, i.healed, i.recovered, i.instruction, i.mount, i.why);
	scm_blocks(r, print_block, NULL);
	TRY(scm_close(r));
	return 0;
}

/* set PATH I V: one transaction that sets a cell and puts a block of 100 bytes of V in its slot, if I is below 6. */
static int cmd_set(char **a)
{
	scm_region *r = open_at(a[0], NULL);
	struct cells *c = root_of(r);
	int i = atoi(a[1]);
	uint64_t v = strtoull(a[2], NULL, 10);
	scm_tx *t;
	void *p;
	TRY(scm_tx_begin(r, &t));
	struct scm_range rs[] = {{&c->a[i].v, 8}, {&c->block[i % 6], 8}};
	TRY(scm_tx_add_ranges(t, rs, i < 6 ? 2 : 1));
	c->a[i].v = v;
	if (i < 6) {
		if (c->block[i])
			TRY(scm_tx_free(t, scm_ptr(r, c->block[i])));
		TRY(scm_tx_alloc(t, 100, &p));
		memset(p, (int)v, 100);
		c->block[i] = scm_offset(r, p);
	}
	TRY(scm_tx_commit(t));
	TRY(scm_close(r));
	return 0;
}

static int cmd_get(char **a)
{
	scm_region *r = open_at(a[0], NULL);
	struct cells *c = root_of(r);
	for (int i = 0; i < 12; i++) {
		printf("%llu", (unsigned long long)c->a[i].v);
		const uint8_t *b = i < 6 && c->block[i] ? scm_ptr(r, c->block[i]) : NULL;
		if (b)
			printf(":%u,%u", b[0], b[99]);
		printf(" ");
	}
	struct scm_info info;
	TRY(scm_info(r, &info));
	printf("recovered %u\n", info.recovered);
	TRY(scm_close(r));
	return 0;
}

/* hang PATH: leaves a transaction open: cells, a long log, blocks, a free. It waits for its end. */
static int cmd_hang(char **a)
{
	scm_region *r = open_at(a[0], NULL);
	struct cells *c = root_of(r);
	scm_tx *t;
	void *p;
	TRY(scm_tx_begin(r, &t));
	struct scm_range rs[] = {{&c->a[0].v, 8}, {&c->a[1].v, 8}, {c->wide, sizeof(c->wide)}};
	TRY(scm_tx_add_ranges(t, rs, 3));
	c->a[0].v = c->a[1].v = 999;
	memset(c->wide, 0xee, sizeof(c->wide));
	TRY(scm_tx_alloc(t, 20000, &p));
	if (c->block[0])
		TRY(scm_tx_free(t, scm_ptr(r, c->block[0])));
	TRY(scm_tx_add(t, &c->block[0], 8)); /* logs the allocation and the free as well */
	c->block[0] = scm_offset(r, p);
	TRY(scmi_tx_settle_ops(t)); /* the bitmaps are changed already: the last moment before the commit */
	printf("ready\n");
	fflush(stdout);
	for (;;)
		pause();
}

/* work PATH: the child of the SIGKILL test. Pairs of cells whose sum never changes, blocks that move; each line it prints is a promise. */
static int cmd_work(char **a)
{
	scm_region *r = open_at(a[0], NULL);
	struct cells *c = root_of(r);
	unsigned seed = (unsigned)getpid();
	for (;;) {
		scm_tx *t;
		void *p;
		int i = rand_r(&seed) % 6, j = 6 + rand_r(&seed) % 5, k = rand_r(&seed) % 6;
		size_t n = 1 + (size_t)rand_r(&seed) % 40000;
		TRY(scm_tx_begin(r, &t));
		struct scm_range rs[] = {{&c->a[i].v, 8}, {&c->a[j].v, 8}, {&c->a[11].v, 8}, {&c->block[k], 8}};
		TRY(scm_tx_add_ranges(t, rs, 4));
		c->a[i].v--, c->a[j].v++;
		uint64_t count = ++c->a[11].v;
		if (c->block[k])
			TRY(scm_tx_free(t, scm_ptr(r, c->block[k])));
		TRY(scm_tx_alloc(t, n, &p));
		memset(p, k, n);
		c->block[k] = scm_offset(r, p);
		if (rand_r(&seed) % 8 == 0) {
			TRY(scm_tx_abort(t));
			continue;
		}
		TRY(scm_tx_commit(t));
		char line[32];
		int len = snprintf(line, sizeof(line), "%llu\n", (unsigned long long)count);
		if (write(1, line, (size_t)len) != len)
			return 1;
	}
}

/* churn PATH SEED: allocates and frees in a region whose root object is another program's. */
static int cmd_churn(char **a)
{
	scm_region *r = open_at(a[0], NULL);
	unsigned seed = (unsigned)atoi(a[1]);
	void *mine[64] = {0};
	for (int n = 0; n < 3000; n++) {
		scm_tx *t;
		int i = rand_r(&seed) % 64;
		TRY(scm_tx_begin(r, &t));
		if (mine[i]) {
			TRY(scm_tx_free(t, mine[i]));
			mine[i] = NULL;
		} else {
			size_t size = 1 + (size_t)rand_r(&seed) % (n % 20 ? 600 : 9000);
			TRY(scm_tx_alloc(t, size, &mine[i]));
			memset(mine[i], 0xff, size);
		}
		TRY(scm_tx_commit(t));
	}
	for (int i = 0; i < 64; i++) {
		scm_tx *t;
		TRY(scm_tx_begin(r, &t));
		if (mine[i])
			TRY(scm_tx_free(t, mine[i]));
		TRY(scm_tx_commit(t));
	}
	TRY(scm_close(r));
	return 0;
}

/* Threads: each moves value between cells of its own and blocks of its own, in transactions that share runs, words and lanes. */
static scm_region *shared;
static void *mover(void *arg)
{
	struct cells *c = root_of(shared);
	unsigned id = (unsigned)(uintptr_t)arg, seed = id;
	for (int n = 0; n < 2000; n++) {
		scm_tx *t;
		void *p;
		TRY(scm_tx_begin(shared, &t));
		struct scm_range rs[] = {{&c->a[id].v, 8}, {&c->block[id], 8}};
		TRY(scm_tx_add_ranges(t, rs, 2));
		c->a[id].v++;
		if (c->block[id])
			TRY(scm_tx_free(t, scm_ptr(shared, c->block[id])));
		size_t size = 1 + (size_t)rand_r(&seed) % (n % 50 ? 200 : 30000);
		TRY(scm_tx_alloc(t, size, &p));
		for (size_t i = 0; i < size; i++)
			CHECK(((uint8_t *)p)[i] == 0);
		memset(p, 0xa0 + (int)id, size);
		c->block[id] = scm_offset(shared, p);
		if (n % 7 == 0) {
			TRY(scm_tx_abort(t));
			TRY(scm_tx_begin(shared, &t));
			TRY(scm_tx_add(t, &c->a[id].v, 8));
			c->a[id].v++;
		}
		TRY(scm_tx_commit(t));
	}
	return NULL;
}

static int count_block(scm_off off, uint64_t size, void *arg)
{
	(void)off, (void)size;
	++*(int *)arg;
	return 0;
}

static int cmd_threads(char **a)
{
	pthread_t th[6];
	struct scm_options o = {.flags = SCM_OPEN_CREATE, .size = 1 << 20, .lanes = 3};
	shared = open_at(a[0], &o);
	struct cells *c = root_of(shared);
	for (uintptr_t i = 0; i < 6; i++)
		CHECK(!pthread_create(&th[i], NULL, mover, (void *)i));
	for (int i = 0; i < 6; i++)
		pthread_join(th[i], NULL);
	int blocks = 0;
	scm_blocks(shared, count_block, &blocks);
	CHECK(blocks == 7); /* the root and one each */
	for (int i = 0; i < 6; i++)
		CHECK(c->a[i].v == 2000);
	TRY(scm_close(shared));
	return 0;
}

static int touch(void *p) { return *(volatile uint8_t *)p ? 0 : 0; }

/* api PATH: what each function answers to right and wrong use. */
static int cmd_api(char **a)
{
	struct scm_options o = {.flags = SCM_OPEN_CREATE, .size = 256 << 10, .layout = "api", .lanes = 2};
	scm_region *r, *r2;
	scm_tx *t, *t2;
	void *p, *q, *z;
	struct scm_info info;
	CHECK(scm_open(&r, a[0], NULL) == SCM_E_NOREGION && !r);
	r = open_at(a[0], &o);
	CHECK(scm_open(&r2, a[0], &o) == SCM_E_LOCKED && strstr(scm_errormsg(), a[0]));
	struct cells *c = root_of(r);
	CHECK(scm_root(r, 8, 0, &p) == SCM_E_TYPE);
	CHECK((uintptr_t)c % 64 == 0 && scm_ptr(r, scm_offset(r, c)) == c && scm_ptr(r, 0) == NULL && scm_ptr(r, 4096) == NULL && scm_offset(r, &r) == 0);
	CHECK(scm_persist(r, c, sizeof(*c)) == 0 && scm_persist(r, &r, 8) == SCM_E_RANGE && scm_persist(r, c, 1 << 20) == SCM_E_RANGE);
	CHECK(scm_persist(r, c, 0) == 0 && scm_persist(NULL, c, 8) == SCM_E_INVALID);
	/* a copy past the cache, at every alignment */
	uint8_t src[3000];
	for (size_t i = 0; i < sizeof(src); i++)
		src[i] = (uint8_t)(i * 7);
	for (size_t at = 0; at < 20; at++) {
		uint8_t *w = (uint8_t *)c->wide;
		memset(w, 0, sizeof(c->wide));
		CHECK(!scm_copy_nt(r, w + at, src, 2900 + at) && !scm_drain(r) && !memcmp(w + at, src, 2900 + at));
		CHECK(w[at + 2900 + at] == 0 && (at == 0 || w[at - 1] == 0));
	}
	/* allocate, free, twice, elsewhere; take back */
	TRY(scm_tx_begin(r, &t));
	TRY(scm_tx_alloc(t, 0, &p));
	TRY(scm_tx_alloc(t, 64, &q));
	TRY(scm_tx_alloc(t, 30000, &z));
	CHECK((uintptr_t)p % 32 == 0 && (uintptr_t)q % 64 == 0 && (uintptr_t)z % 64 == 0);
	CHECK(scm_tx_free(t, q) == 0 && scm_tx_free(t, q) == SCM_E_FREE && scm_tx_free(t, (char *)z + 64) == SCM_E_FREE && scm_tx_free(t, &r) == SCM_E_FREE);
	CHECK(scm_close(r) == SCM_E_BUSY);
	TRY(scm_tx_add(t, c->block, 8));
	c->block[0] = scm_offset(r, p), c->bulk = scm_offset(r, z);
	CHECK(scm_tx_add(t, r->mem.base + ROOT_AT, 8) == SCM_E_RANGE && scm_tx_add(t, &r, 8) == SCM_E_RANGE && scm_tx_dirty(t, &r, 8) == SCM_E_RANGE);
	TRY(scm_tx_commit(t));
	CHECK(scm_tx_commit(t) == SCM_E_TXDONE && scm_tx_abort(t) == SCM_E_TXDONE && scm_tx_alloc(t, 1, &p) == SCM_E_TXDONE);
	TRY(scm_tx_begin(r, &t));
	TRY(scm_tx_begin(r, &t2));
	TRY(scm_tx_free(t, z));
	CHECK(scm_tx_free(t2, z) == SCM_E_FREE);
	TRY(scm_tx_abort(t));
	TRY(scm_tx_free(t2, z));
	TRY(scm_tx_commit(t2));
	CHECK(scm_free_from(r, &c->bulk) == SCM_E_FREE);
	/* an abort takes everything back */
	TRY(scm_tx_begin(r, &t));
	TRY(scm_tx_add(t, &c->flag, 8));
	c->flag = 77;
	TRY(scm_tx_alloc(t, 500, &q));
	TRY(scm_tx_abort(t));
	CHECK(c->flag == 0);
	int before = 0, blocks = 0;
	scm_blocks(r, count_block, &before);
	/* full: said so, nothing lost, and the same amount fits again and again */
	for (int round = 0; round < 3; round++) {
		static void *all[4096];
		int n = 0, rc;
		TRY(scm_tx_begin(r, &t));
		while ((rc = scm_tx_alloc(t, 1000, &all[n])) == 0)
			n++;
		CHECK(rc == SCM_E_FULL && n > 100);
		rc = scm_tx_commit(t);
		CHECK(rc == 0 || rc == SCM_E_FULL); /* the log of so many needs room, too */
		blocks = 0;
		scm_blocks(r, count_block, &blocks);
		CHECK(blocks == (rc ? before : before + n));
		for (int i = 0; i < n && !rc; i += 50) {
			TRY(scm_tx_begin(r, &t));
			for (int k = i; k < i + 50 && k < n; k++)
				TRY(scm_tx_free(t, all[k]));
			TRY(scm_tx_commit(t));
		}
	}
	blocks = 0;
	scm_blocks(r, count_block, &blocks);
	CHECK(blocks == before);
	TRY(scm_alloc_to(r, &c->bulk, 123456));
	CHECK(c->bulk && scm_alloc_to(r, &c->bulk, 1 << 30) == SCM_E_FULL && scm_alloc_to(r, &c->bulk, SIZE_MAX) == SCM_E_FULL);
	TRY(scm_free_from(r, &c->bulk));
	/* a child of fork may look, and no more */
	pid_t pid = fork();
	if (pid == 0)
		_exit(scm_tx_begin(r, &t) == SCM_E_CLOSED && scm_persist(r, c, 8) == SCM_E_CLOSED && scm_close(r) == 0 ? 0 : 1);
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(scm_open(&r2, a[0], &o) == SCM_E_LOCKED);
	TRY(scm_info(r, &info));
	void *base = info.base;
	CHECK(!strcmp(info.layout, "api") && info.lanes == 2 && info.generation == 1 && info.size == 256 << 10 && !info.moved);
	TRY(scm_close(r));
	/* the same address again, for programs that keep raw pointers; and a clear word where it is taken */
	o.flags = SCM_OPEN_SAME_ADDRESS;
	r = open_at(a[0], &o);
	TRY(scm_info(r, &info));
	CHECK(info.base == base && info.generation == 2 && !info.moved);
	TRY(scm_close(r));
	void *taken = mmap(base, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(scm_open(&r, a[0], &o) == SCM_E_ADDRESS);
	o.flags = 0;
	r = open_at(a[0], &o);
	TRY(scm_info(r, &info));
	CHECK(info.moved && info.base != base);
	TRY(scm_close(r));
	munmap(taken, 4096);
	/* read-only: a private view */
	o.flags = SCM_OPEN_READONLY;
	r = open_at(a[0], &o);
	CHECK(scm_open(&r2, a[0], NULL) == SCM_E_LOCKED);
	c = root_of(r);
	CHECK(scm_tx_begin(r, &t) == SCM_E_READONLY && scm_persist(r, c, 8) == SCM_E_READONLY);
	TRY(scm_close(r));
	/* a file that is cut under the mapping: an error, not the end */
	o.flags = 0;
	r = open_at(a[0], &o);
	c = root_of(r);
	TRY(scm_tx_begin(r, &t));
	CHECK(truncate(a[0], 16384) == 0);
	CHECK(scm_guard(r, touch, c) == SCM_E_MEDIA && strstr(scm_errormsg(), "memory fault at offset"));
	CHECK(scm_tx_add(t, &c->flag, 8) == SCM_E_MEDIA);
	scm_tx_abort(t);
	scm_close(r);
	CHECK(scm_open(&r, a[0], NULL) == SCM_E_SIZE);
	o.layout = NULL, o.flags = 64;
	CHECK(scm_open(&r, a[0], &o) == SCM_E_INVALID);
	return 0;
}

/* The paper's names. The environment is the test's. */
static int cmd_paper(char **a)
{
	uint64_t *root = scmroot(64);
	if (!root) {
		printf("error %s\n", scm_errormsg());
		return 3;
	}
	uint32_t *p = scmalloc(20000 * 4), *q = scmalloc(100);
	CHECK(p && q && p != q);
	for (int i = 0; i < 20000; i++)
		p[i] = (uint32_t)i;
	CHECK(scmsync(p, 20000 * 4) == 0);
	root[0]++, root[1] = scm_offset(scm_default(), p);
	CHECK(scmsync(root, 64) == 0);
	CHECK(scmsync(a, 4) == -1);
	scmfree(q);
	struct scm_info i;
	TRY(scm_info(scm_default(), &i));
	printf("runs %llu mode %u granularity %u durability %u instruction %s\n", (unsigned long long)root[0], i.mode, i.granularity, i.durability, i.instruction);
	return 0;
}

static uint64_t rnd_state;
static uint64_t rnd(void)
{
	rnd_state ^= rnd_state << 13, rnd_state ^= rnd_state >> 7, rnd_state ^= rnd_state << 17;
	return rnd_state;
}

/* fuzz IMAGE N SEED: damages copies of a region, with checksums made right again or not, and uses what still opens. Nothing may lead outside the
 * region (the sanitizer watches), and what is refused is unchanged. */
static int cmd_fuzz(char **a)
{
	int fd = open(a[0], O_RDONLY);
	struct stat st;
	CHECK(fd >= 0 && !fstat(fd, &st));
	size_t size = (size_t)st.st_size;
	uint8_t *base = malloc(size), *was = malloc(size);
	CHECK(base && was && read(fd, base, size) == (ssize_t)size);
	rnd_state = strtoull(a[2], NULL, 10) * 2654435761u + 88172645463325252ull;
	int opened = 0, refused = 0;
	for (int n = atoi(a[1]); n > 0; n--) {
		/* of its exact size and on its own, so that the sanitizer sees a step outside */
		size_t len = rnd() % 8 ? size : (size_t)(rnd() % (size + 8192)) & ~(size_t)(rnd() % 2 ? 4095 : 7);
		void *own;
		CHECK(!posix_memalign(&own, 4096, len ? len : 8));
		uint8_t *img = own;
		memset(img, 0, len);
		memcpy(img, base, len < size ? len : size);
		static const uint64_t odd[] = {0, 1, 2, 7, 63, 64, 127, 128, 255, 4095, 4096, 65535, 1u << 31, UINT32_MAX, 1ull << 32, 1ull << 46, 1ull << 63, UINT64_MAX};
		uint64_t lane = LANES_AT + SCM_LINE, parts[] = {0, 0, 4096, ROOT_AT, lane, lane, LANES_AT, 16384 + 4096};
		for (uint64_t k = rnd() % 4 + 1; k > 0; k--) {
			uint64_t at = parts[rnd() % 8] + rnd() % (rnd() % 2 ? 256 : 4096), v = rnd() % 2 ? odd[rnd() % 18] : rnd();
			size_t w = 1u << rnd() % 4;
			if (rnd() % 2)
				at &= ~(uint64_t)(w - 1);
			if (at + w <= len)
				memcpy(img + at, &v, w);
		}
		if (rnd() % 4 && len >= 2 * HEADER_SIZE) { /* headers with right checksums */
			for (int c = 0; c < 2; c++) {
				uint32_t crc = scmi_crc32c(img + c * 4096, 508);
				memcpy(img + c * 4096 + 508, &crc, 4);
			}
			if (rnd() % 2)
				memcpy(img + 4096, img, HEADER_LEN);
		}
		for (uint64_t pos = lane, k = 0; k < 8 && pos + 64 <= len; k++) { /* and records */
			uint32_t rec;
			memcpy(&rec, img + pos + 4, 4);
			if (rec < 32 || rec > len - pos)
				break;
			uint32_t crc = scmi_crc32c(img + pos + 4, rec - 4);
			memcpy(img + pos, &crc, 4);
			pos += align_up(rec, 64);
		}
		memcpy(was, img, len < size ? len : size);
		struct scm_options o = {.flags = rnd() % 4 ? 0 : SCM_OPEN_CREATE};
		scm_region *r = scmi_image_open(img, len, &o);
		if (!r) {
			refused++;
			CHECK(*scm_errormsg() && !memcmp(was, img, len < size ? len : size));
		} else {
			opened++;
			scm_tx *t;
			void *p;
			int blocks = 0;
			scm_blocks(r, count_block, &blocks);
			if (!scm_root(r, 0, 0, &p))
				scm_persist(r, p, 8);
			if (!scm_tx_begin(r, &t)) {
				for (int k = 0; k < 20; k++)
					if (!scm_tx_alloc(t, (size_t)(rnd() % 40000), &p) && k % 3)
						scm_tx_add(t, p, 8);
				for (int k = 0; k < 20; k++)
					scm_tx_free(t, img + rnd() % (len + 1) / 32 * 32);
				if (rnd() % 2)
					scm_tx_commit(t);
				else
					scm_tx_abort(t);
			}
			CHECK(scm_close(r) == 0 || *scm_errormsg());
		}
		free(own);
	}
	free(base);
	free(was);
	printf("opened %d refused %d\n", opened, refused);
	return 0;
}

int cmd_full(char **a); /* full.c */

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int args;
		int (*fn)(char **);
	} cmds[] = {{"open", 7, cmd_open}, {"set", 3, cmd_set}, {"get", 1, cmd_get}, {"hang", 1, cmd_hang}, {"work", 1, cmd_work},
		{"churn", 2, cmd_churn}, {"threads", 1, cmd_threads}, {"api", 1, cmd_api}, {"paper", 0, cmd_paper}, {"fuzz", 3, cmd_fuzz},
		{"full", 2, cmd_full}};
	for (size_t i = 0; argc > 1 && i < sizeof(cmds) / sizeof(cmds[0]); i++)
		if (!strcmp(argv[1], cmds[i].name) && argc == cmds[i].args + 2)
			return cmds[i].fn(argv + 2);
	fprintf(stderr, "usage: tool COMMAND ARGUMENT...\n");
	return 2;
}
