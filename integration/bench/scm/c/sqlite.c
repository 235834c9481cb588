/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The transactions of the benchmark on SQLite: what a C program would take instead. Speaks package wire.
 *   sqlite CPU ROWS ELEMENTS PATH
 * In WAL mode, and with synchronous=FULL, so that each commit is synced: its default, DELETE, syncs more often.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sqlite3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static sqlite3 *db;
static sqlite3_stmt *begin, *commit, *update, *insert;
static long rows, elements;
static uint64_t array_rnd = 88172645463325252ull, tree_rnd = 88172645463325252ull;

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

static int run(const char *sql) { return sqlite3_exec(db, sql, NULL, NULL, NULL); }

/* Returns 0, or a code that sqlite3_errmsg explains. */
static int step(sqlite3_stmt *s)
{
	int rc = sqlite3_step(s), reset = sqlite3_reset(s);
	return rc == SQLITE_DONE ? reset : rc;
}

static int prepare(const char *sql, sqlite3_stmt **out) { return sqlite3_prepare_v3(db, sql, -1, SQLITE_PREPARE_PERSISTENT, out, NULL); }

static int open_db(const char *path)
{
	int rc = sqlite3_open(path, &db);
	if (!rc)
		rc = run("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE a (i INTEGER PRIMARY KEY, v INTEGER); CREATE TABLE t (k INTEGER PRIMARY KEY, v INTEGER)");
	if (!rc)
		rc = prepare("BEGIN IMMEDIATE", &begin);
	if (!rc)
		rc = prepare("COMMIT", &commit);
	if (!rc)
		rc = prepare("UPDATE a SET v = v + 1 WHERE i = ?", &update);
	if (!rc)
		rc = prepare("INSERT INTO t VALUES (?, 1)", &insert);
	return rc;
}

static int make_array(void)
{
	char sql[200];
	snprintf(sql, sizeof(sql), "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM n WHERE i+1 < %ld) INSERT INTO a SELECT i, 0 FROM n", rows);
	return run(sql);
}

static int tx10(long n)
{
	for (; n > 0; n--) {
		int rc = step(begin);
		for (int i = 0; i < 10 && !rc; i++) {
			sqlite3_bind_int64(update, 1, (int64_t)((next(&array_rnd) >> 32) * (uint64_t)rows >> 32));
			rc = step(update);
		}
		if (!rc)
			rc = step(commit);
		if (rc)
			return rc;
	}
	return 0;
}

static int put(void)
{
	sqlite3_bind_int64(insert, 1, (int64_t)next(&tree_rnd));
	return step(insert);
}

static int make_tree(void)
{
	int rc = step(begin);
	for (long i = 0; i < elements && !rc; i++)
		rc = put();
	return rc ? rc : step(commit);
}

static int btree_tx(long n)
{
	for (; n > 0; n--) {
		int rc = step(begin);
		if (!rc)
			rc = put();
		if (!rc)
			rc = step(commit);
		if (rc)
			return rc;
	}
	return 0;
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

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

int main(int argc, char **argv)
{
	if (argc != 5) {
		fputs("usage: sqlite CPU ROWS ELEMENTS PATH\n", stderr);
		return 2;
	}
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[1]), &set);
	rows = atol(argv[2]), elements = atol(argv[3]);
	if (sched_setaffinity(0, sizeof(set), &set) || open_db(argv[4])) {
		printf("{\"error\":");
		quoted(db ? sqlite3_errmsg(db) : "sched_setaffinity");
		puts("}");
		return 1;
	}
	puts("{\"granularity\":\"page\",\"why\":\"SQLite, write-ahead log, synchronous=FULL\"}");
	fflush(stdout);
	char line[256], op[32];
	long n, warm;
	int made_array = 0, made_tree = 0;
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "{\"op\":\"%31[^\"]\",\"n\":%ld,\"warm\":%ld}", op, &n, &warm) != 3) {
			fputs("worker: a request that is none\n", stderr);
			return 1;
		}
		int is_array = !strcmp(op, "tx10"), rc = 0;
		if (!is_array && strcmp(op, "btree-tx")) {
			puts("{\"ns\":0,\"error\":\"no such workload here\"}");
			fflush(stdout);
			continue;
		}
		if (is_array && !made_array)
			rc = make_array(), made_array = 1;
		else if (!is_array && !made_tree)
			rc = make_tree(), made_tree = 1;
		if (!rc)
			rc = is_array ? tx10(warm) : btree_tx(warm);
		int64_t began = now();
		if (!rc)
			rc = is_array ? tx10(n) : btree_tx(n);
		printf("{\"ns\":%lld", (long long)(now() - began));
		if (rc) {
			printf(",\"error\":");
			quoted(sqlite3_errmsg(db));
		}
		puts("}");
		fflush(stdout);
	}
	sqlite3_finalize(begin), sqlite3_finalize(commit), sqlite3_finalize(update), sqlite3_finalize(insert);
	return sqlite3_close(db) ? 1 : 0;
}
