/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What ../ledger is in Go, with libscm. Each opens what the other has left, so layout, transactions and output are the same. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <scm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CELLS 32
#define MOST_WORDS 2048
#define SIZE (1 << 20)

struct content {
	uint64_t count, cells[CELLS];
	scm_off block;
	uint64_t length;
};

static void fail(const char *what)
{
	printf("failed: %s\n", what);
	exit(1);
}

/* With the library's own words. */
static void must(int code)
{
	if (code != 0)
		fail(scm_errormsg());
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9;
	x ^= x >> 27;
	x *= 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static void plan(uint64_t n, uint64_t *from, uint64_t *to, uint64_t *words)
{
	uint64_t x = mix(n + 1);
	*from = x % CELLS;
	*to = (x >> 16) % CELLS;
	*words = 1 + (x >> 32) % MOST_WORDS;
}

static void transaction(scm_region *r, struct content *c, uint64_t n, int take_back)
{
	uint64_t from, to, words;
	plan(n, &from, &to, &words);
	scm_tx *tx;
	must(scm_tx_begin(r, &tx));
	struct scm_range ranges[] = {{&c->count, 8}, {&c->cells[from], 8}, {&c->cells[to], 8}, {&c->block, 8}, {&c->length, 8}};
	must(scm_tx_add_ranges(tx, ranges, 5));
	c->count++;
	c->cells[from]--;
	c->cells[to]++;
	if (c->block)
		must(scm_tx_free(tx, scm_ptr(r, c->block)));
	void *p;
	must(scm_tx_alloc(tx, words * 8, &p));
	for (uint64_t i = 0; i < words; i++)
		((uint64_t *)p)[i] = n ^ i;
	c->block = scm_offset(r, p);
	c->length = words;
	must(take_back ? scm_tx_abort(tx) : scm_tx_commit(tx));
}

static int count_block(scm_off off, uint64_t size, void *arg)
{
	(void)off, (void)size;
	++*(uint64_t *)arg;
	return 0;
}

static void verify(scm_region *r, const struct content *c)
{
	char text[128];
	struct content want = {.count = c->count, .block = c->block};
	for (uint64_t n = 0; n < c->count; n++) {
		uint64_t from, to;
		plan(n, &from, &to, &want.length);
		want.cells[from]--;
		want.cells[to]++;
	}
	if (memcmp(c, &want, sizeof(want)) != 0) {
		snprintf(text, sizeof(text), "after %" PRIu64 " transactions the root is not as they leave it", c->count);
		fail(text);
	}
	uint64_t blocks = 0;
	must(scm_blocks(r, count_block, &blocks));
	if (blocks != 1 + (c->count > 0)) {
		snprintf(text, sizeof(text), "after %" PRIu64 " transactions there are %" PRIu64 " blocks", c->count, blocks);
		fail(text);
	}
	const uint64_t *words = scm_ptr(r, c->block);
	for (uint64_t i = 0; i < c->length; i++)
		if (!words || words[i] != ((c->count - 1) ^ i)) {
			snprintf(text, sizeof(text), "word %" PRIu64 " of the block of transaction %" PRIu64 " is wrong", i, c->count - 1);
			fail(text);
		}
}

static const char *const granularities[] = {"any", "byte", "cache line", "page"};
static const char *const durabilities[] = {"any", "volatile", "process crash", "power loss"};

static void say(scm_region *r)
{
	struct scm_info i;
	must(scm_info(r, &i));
	printf("granularity %s\ndurability %s\nfilesystem %s\nmount %s\nwhy %s\ninstruction %s\n", granularities[i.granularity & 3],
	       durabilities[i.durability & 3], i.filesystem, i.mount, i.why, i.instruction);
	printf("dax %u\nmapsync %u\neadr %u\nrecovered %u\ngeneration %" PRIu64 "\n", i.dax, i.map_sync, i.eadr, i.recovered, i.generation);
}

static uint32_t named(const char *value, const char *const *names, uint32_t n)
{
	for (uint32_t i = 1; i < n; i++)
		if (!strcmp(value, names[i]))
			return i;
	fail("an option has a value that is not known");
	return 0;
}

int main(int argc, char **argv)
{
	static const char *const g[] = {"", "byte", "cacheline", "page"}, *const d[] = {"", "volatile", "process", "power"};
	struct scm_options o = {.flags = SCM_OPEN_CREATE, .layout = "pmem-ledger"};
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc < 2)
		fail("use info, verify, work or hold");
	const char *what = argv[1];
	int at = 2, port = -1;
	for (; at < argc && argv[at][0] == '-'; at++) {
		if (!strcmp(argv[at], "-unsafe"))
			o.flags |= SCM_OPEN_ACCEPT_UNSAFE;
		else if (!strcmp(argv[at], "-granularity") && at + 1 < argc)
			o.require_granularity = named(argv[++at], g, 4);
		else if (!strcmp(argv[at], "-durability") && at + 1 < argc)
			o.require_durability = named(argv[++at], d, 4);
		else
			fail("an option is not known");
	}
	if (!strcmp(what, "work")) {
		if (at == argc)
			fail("work needs a port");
		if ((port = open(argv[at++], O_WRONLY)) < 0)
			fail(strerror(errno));
	}
	const char *path = at < argc ? argv[at] : NULL;
	if (path && access(path, F_OK) != 0)
		o.size = SIZE;
	scm_region *r;
	must(scm_open(&r, path, &o));
	say(r);
	if (strcmp(what, "info") != 0) {
		void *root;
		must(scm_root(r, sizeof(struct content), 0, &root));
		struct content *c = root;
		verify(r, c);
		printf("count %" PRIu64 "\n", c->count);
		if (!strcmp(what, "hold")) {
			printf("holding\n");
			for (;;)
				pause();
		}
		if (port >= 0)
			printf("working\n");
		while (port >= 0) {
			char line[24];
			if (c->count % 8 == 7)
				transaction(r, c, ~c->count, 1);
			transaction(r, c, c->count, 0);
			int n = snprintf(line, sizeof(line), "%" PRIu64 "\n", c->count);
			if (write(port, line, (size_t)n) != n)
				fail(strerror(errno));
		}
	}
	must(scm_close(r));
	return 0;
}
