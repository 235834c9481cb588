/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The workloads of the benchmark in C, on libscm or, with -DPMDK, on libpmemobj. Speaks package wire on standard input and output.
 *   worker CPU ARRAY ELEMENTS STREAM [PATH SIZE]
 * CPU to run on; integers in the array; elements of the tree before inserts are measured; doubles in each array of STREAM, 0: no STREAM.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct hello {
	const char *granularity, *durability, *why, *mount, *instruction;
};

#ifdef PMDK
#include "memory_pmdk.h"
#else
#include "memory_scm.h"
#endif
#include "btree.h"

static size_t array_len, elements, stream_len;
static uint64_t array, vectors[3];
static uint64_t plain_tree, tx_tree;
static uint64_t plain_rnd = 88172645463325252ull, tx_rnd = 88172645463325252ull;

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

static uint64_t below(uint64_t *x, uint64_t n) { return (next(x) >> 32) * n >> 32; }

/* A zeroed block that nothing else will ever ask for. */
static int block(size_t n, uint64_t *ref)
{
	int rc = tx_begin();
	if (!rc)
		rc = tx_alloc(n, ref);
	return rc ? rc : tx_commit();
}

static int update(long n)
{
	static uint64_t rnd = 88172645463325252ull;
	int32_t *a = at(array);
	for (; n > 0; n--)
		a[below(&rnd, array_len)]++;
	return 0;
}

static int update_sync(long n)
{
	static uint64_t rnd = 88172645463325252ull;
	for (; n > 0; n--) {
		uint64_t ref = array + 4 * below(&rnd, array_len);
		++*(int32_t *)at(ref);
		int rc = persist(ref, 4);
		if (rc)
			return rc;
	}
	return 0;
}

static int tx10(long n)
{
	static uint64_t rnd = 88172645463325252ull;
	for (; n > 0; n--) {
		uint64_t refs[10];
		for (int i = 0; i < 10; i++)
			refs[i] = array + 4 * below(&rnd, array_len);
		int rc = tx_begin();
		if (!rc)
			rc = tx_add_many(refs, 10, 4);
		if (rc)
			return rc;
		for (int i = 0; i < 10; i++)
			++*(int32_t *)at(refs[i]);
		if ((rc = tx_commit()))
			return rc;
	}
	return 0;
}

/* STREAM's kernels (McCalpin), each a pass over whole arrays. */
#define KERNEL(name, expression)                                                                              \
	static int name(long n)                                                                               \
	{                                                                                                     \
		double *restrict a = at(vectors[0]), *restrict b = at(vectors[1]), *restrict c = at(vectors[2]); \
		for (; n > 0; n--) {                                                                          \
			for (size_t i = 0; i < stream_len; i++)                                               \
				expression;                                                                   \
			__asm__ volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");                           \
		}                                                                                             \
		return 0;                                                                                     \
	}
KERNEL(copy, c[i] = a[i])
KERNEL(scale, b[i] = 3.0 * c[i])
KERNEL(add, c[i] = a[i] + b[i])
KERNEL(triad, a[i] = b[i] + 3.0 * c[i])

static int make_stream(void)
{
	if (!stream_len)
		return -1;
	for (int i = 0; i < 3 && !vectors[i]; i++) {
		int rc = block(stream_len * 8, &vectors[i]);
		if (rc)
			return rc;
		double *v = at(vectors[i]);
		for (size_t k = 0; k < stream_len; k++)
			v[k] = i + 1;
	}
	return 0;
}

/* Before each run the tree is as it was when it had its elements, so that it does not grow from slice to slice. */
static struct tree *plain_saved;

static int reset_plain(void)
{
	struct tree *t = at(plain_tree);
	uint64_t start = plain_saved->root; /* of the space; the saved tree's own words follow */
	*t = plain_saved[1];
	memcpy(at(start), plain_saved + 2, t->spare - start);
	return 0;
}

static int btree_plain(long n)
{
	int rc = 0;
	for (; n > 0 && !rc; n--)
		rc = insert(plain_tree, next(&plain_rnd), 1, false);
	return rc;
}

static int make_plain(void)
{
	uint64_t space;
	size_t room = 100ull * (elements + 60000); /* more than a run adds */
	int rc = block(sizeof(struct tree), &plain_tree);
	if (!rc)
		rc = block(room, &space);
	if (rc)
		return rc;
	struct tree *t = at(plain_tree);
	t->spare = space, t->end = space + room;
	rc = btree_plain((long)elements);
	if (rc)
		return rc;
	size_t used = t->spare - space;
	plain_saved = malloc(2 * sizeof(*t) + used);
	if (!plain_saved)
		return -1;
	plain_saved[0] = (struct tree){.root = space};
	plain_saved[1] = *t;
	memcpy(plain_saved + 2, at(space), used);
	return 0;
}

static int btree_tx(long n)
{
	for (; n > 0; n--) {
		int rc = tx_begin();
		if (!rc)
			rc = insert(tx_tree, next(&tx_rnd), 1, true);
		if (!rc)
			rc = tx_commit();
		if (rc)
			return rc;
	}
	return 0;
}

/* The first elements come without transactions, and are then made durable at once: where that takes msync, each would wait for the disk. */
static int make_tx(void)
{
	uint64_t space;
	size_t room = 100ull * (elements + 1000);
	int rc = block(sizeof(struct tree), &tx_tree);
	if (!rc)
		rc = block(room, &space);
	if (rc)
		return rc;
	struct tree *t = at(tx_tree);
	t->spare = space, t->end = space + room;
	for (size_t done = 0; done < elements && !rc; done++)
		rc = insert(tx_tree, next(&tx_rnd), 1, false);
	if (!rc)
		rc = persist(tx_tree, sizeof(*t));
	return rc ? rc : persist(space, room);
}

static struct workload {
	const char *name;
	int (*make)(void);
	int (*reset)(void);
	int (*run)(long n);
	bool made;
} workloads[] = {
	{.name = "update", .run = update},
	{.name = "update-sync", .run = update_sync},
	{.name = "tx10", .run = tx10},
	{.name = "copy", .make = make_stream, .run = copy},
	{.name = "scale", .make = make_stream, .run = scale},
	{.name = "add", .make = make_stream, .run = add},
	{.name = "triad", .make = make_stream, .run = triad},
	{.name = "btree", .make = make_plain, .reset = reset_plain, .run = btree_plain},
	{.name = "btree-tx", .make = make_tx, .run = btree_tx},
};

/* A JSON string. */
static void quoted(const char *s)
{
	putchar('"');
	for (; s && *s; s++) {
		if (*s == '"' || *s == '\\')
			putchar('\\');
		if ((unsigned char)*s >= ' ')
			putchar(*s);
	}
	putchar('"');
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void answer(const char *op, long n, long warm)
{
	struct workload *w = workloads, *end = workloads + sizeof(workloads) / sizeof(*workloads);
	while (w < end && strcmp(w->name, op))
		w++;
	int rc = w == end ? -1 : 0;
	if (!rc && w->make && !w->made)
		rc = w->make();
	if (!rc) {
		w->made = true;
		rc = w->reset ? w->reset() : 0;
	}
	if (!rc)
		rc = w->run(warm);
	int64_t began = now();
	if (!rc)
		rc = w->run(n);
	printf("{\"ns\":%lld", (long long)(now() - began));
	if (rc) {
		printf(",\"error\":");
		quoted(w == end ? "no such workload here" : why());
	}
	puts("}");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	if (argc != 5 && argc != 7) {
		fputs("usage: worker CPU ARRAY ELEMENTS STREAM [PATH SIZE]\n", stderr);
		return 2;
	}
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[1]), &set);
	array_len = strtoull(argv[2], NULL, 10);
	elements = strtoull(argv[3], NULL, 10);
	stream_len = strtoull(argv[4], NULL, 10);
	struct hello h = {0};
	const char *error = sched_setaffinity(0, sizeof(set), &set) ? "sched_setaffinity" :
		memory_open(argc > 5 ? argv[5] : NULL, argc > 6 ? strtoull(argv[6], NULL, 10) : 0, &h);
	if (!error && block(4 * array_len, &array))
		error = why();
	if (error) {
		printf("{\"error\":");
		quoted(error);
		puts("}");
		return 1;
	}
	printf("{\"granularity\":"), quoted(h.granularity);
	printf(",\"durability\":"), quoted(h.durability);
	printf(",\"why\":"), quoted(h.why);
	printf(",\"mount\":"), quoted(h.mount);
	printf(",\"instruction\":"), quoted(h.instruction);
	puts("}");
	fflush(stdout);
	char line[256], op[32];
	long n, warm;
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "{\"op\":\"%31[^\"]\",\"n\":%ld,\"warm\":%ld}", op, &n, &warm) != 3) {
			fputs("worker: a request that is none\n", stderr);
			return 1;
		}
		answer(op, n, warm);
	}
	return memory_close() ? 1 : 0;
}
