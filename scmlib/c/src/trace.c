/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * For tests only: writes what the library does to one memory to a stream, in order, with the stores that the program itself makes in between (found
 * by comparison with a shadow), so that another program can enumerate the states that a crash may leave. SCM_MUTANT=FILE:LINE leaves out the flush
 * or fence, or believes the checksum, at that place. One thread at a time.
 *
 * An event: u8 kind, u8 agent, u16 length of site, u32 length of data, u64 off, u64 n, site, data. Kinds: W words that the program changed (data:
 * offset and value of each), S an ordered store of a word, C a copy, N stores past the cache, F flush, B fence, M mark, V a checksum that was right.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "trace.h"

static FILE *out;
static uint8_t *traced, *shadow; /* the memory outlives its struct mem: the last mark comes after the close */
static uint64_t size;
static uint8_t agent;
static bool enabled;

void scmi_trace_start(int fd) { enabled = (out = fdopen(dup(fd), "wb")) != NULL; }

void scmi_trace_stop(void)
{
	if (out)
		fclose(out);
	out = NULL, traced = NULL, enabled = false;
	free(shadow);
	shadow = NULL;
}

void scmi_trace_attach(struct mem *m)
{
	if (!enabled)
		return;
	traced = m->base, size = m->size;
	free(shadow);
	shadow = malloc(size);
	if (!shadow)
		abort();
	memcpy(shadow, traced, size);
}

void scmi_trace_agent(unsigned a) { agent = (uint8_t)a; }

static void event(char kind, uint64_t off, uint64_t n, const char *site, const void *data, uint32_t len)
{
	const char *base = site ? strrchr(site, '/') : NULL;
	base = base ? base + 1 : site ? site : "";
	uint8_t head[24] = {(uint8_t)kind, agent};
	uint16_t slen = (uint16_t)strlen(base);
	memcpy(head + 2, &slen, 2);
	memcpy(head + 4, &len, 4);
	memcpy(head + 8, &off, 8);
	memcpy(head + 16, &n, 8);
	fwrite(head, 1, sizeof(head), out);
	fwrite(base, 1, slen, out);
	fwrite(data, 1, len, out);
}

/* The program's own stores: words that differ from what was seen last, outside [skip, skip+n), which the library has just written. */
static void diff(uint64_t skip, uint64_t n)
{
	uint64_t *words = NULL;
	size_t count = 0, cap = 0;
	for (uint64_t b = 0; b < size; b += 4096) {
		if (!memcmp(traced + b, shadow + b, 4096))
			continue;
		for (uint64_t o = b; o < b + 4096; o += 8) {
			if ((o + 8 > skip && o < skip + n) || !memcmp(traced + o, shadow + o, 8))
				continue;
			if (scmi_tx_reserve(&words, &cap, count + 2, 8))
				abort();
			words[count++] = o;
			memcpy(&words[count++], traced + o, 8);
			memcpy(shadow + o, traced + o, 8);
		}
	}
	if (count)
		event('W', 0, 0, NULL, words, (uint32_t)(count * 8));
	free(words);
}

void scmi_trace_store(struct mem *m, char kind, uint64_t off, uint64_t n)
{
	if (!traced || m->base != traced || n == 0)
		return;
	n = align_up(off + n, 8) - (off & ~7ull); /* in whole words, as diff reckons */
	off &= ~7ull;
	diff(off, n);
	event(kind, off, n, NULL, m->base + off, (uint32_t)n);
	memcpy(shadow + off, m->base + off, n);
}

static bool mutant(const char *site)
{
	static const char *which;
	static bool asked;
	if (!asked) {
		which = getenv("SCM_MUTANT");
		asked = true;
	}
	if (!which)
		return false;
	const char *base = strrchr(site, '/');
	return !strcmp(base ? base + 1 : site, which);
}

bool scmi_trace_flush(struct mem *m, uint64_t off, uint64_t n, const char *site)
{
	if (!traced || m->base != traced || n == 0)
		return true;
	diff(0, 0);
	if (mutant(site))
		return false;
	event('F', off, n, site, NULL, 0);
	return true;
}

bool scmi_trace_fence(struct mem *m, const char *site)
{
	if (!traced || m->base != traced)
		return true;
	diff(0, 0);
	if (mutant(site))
		return false;
	event('B', 0, 0, site, NULL, 0);
	return true;
}

bool scmi_trace_verify(bool ok, const char *site)
{
	if (traced && out)
		event('V', 0, 0, site, NULL, 0);
	return ok || mutant(site);
}

void scmi_trace_mark(void)
{
	if (!traced)
		return;
	diff(0, 0);
	event('M', 0, 0, NULL, NULL, 0);
}
