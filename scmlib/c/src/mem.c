/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

static bool env_is_1(const char *name)
{
	const char *s = getenv(name);
	return s && !strcmp(s, "1");
}

#if defined(__x86_64__)
#define HAVE_NT 1
/* CPUID leaf 7, EBX bit 24 CLWB, bit 23 CLFLUSHOPT (Intel SDM vol. 2A); CLFLUSH is part of SSE2. */
static enum insn detect(void)
{
	unsigned a, b = 0, c, d;
	if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
		if (b >> 24 & 1 && !env_is_1("SCM_NO_CLWB"))
			return INSN_CLWB;
		if (b >> 23 & 1 && !env_is_1("SCM_NO_CLFLUSHOPT"))
			return INSN_CLFLUSHOPT;
	}
	return INSN_CLFLUSH;
}

#define FLUSHER(name, insn)                                                      \
	static void name(uintptr_t p, uintptr_t end)                             \
	{                                                                        \
		for (p &= ~(uintptr_t)(SCM_LINE - 1); p < end; p += SCM_LINE)    \
			__asm__ volatile(insn " (%0)" : : "r"(p) : "memory");    \
	}
FLUSHER(flush_clwb, "clwb")
FLUSHER(flush_clflushopt, "clflushopt")
FLUSHER(flush_clflush, "clflush")

static void flush_lines(enum insn i, uintptr_t p, uintptr_t end)
{
	switch (i) {
	case INSN_CLWB: flush_clwb(p, end); break;
	case INSN_CLFLUSHOPT: flush_clflushopt(p, end); break;
	case INSN_CLFLUSH: flush_clflush(p, end); break;
	default: break;
	}
}

static void fence(void) { __asm__ volatile("sfence" : : : "memory"); }

/* dst is aligned to 16, n a multiple of 8. SSE2 is as fast as AVX-512 here from 64 KiB on, and runs under valgrind. */
static void nt_copy(uint8_t *dst, const uint8_t *src, uint64_t n)
{
	for (; n >= 64; n -= 64, dst += 64, src += 64) {
		__m128i a = _mm_loadu_si128((const __m128i *)(const void *)src), b = _mm_loadu_si128((const __m128i *)(const void *)(src + 16));
		__m128i c = _mm_loadu_si128((const __m128i *)(const void *)(src + 32)), d = _mm_loadu_si128((const __m128i *)(const void *)(src + 48));
		_mm_stream_si128((__m128i *)(void *)dst, a);
		_mm_stream_si128((__m128i *)(void *)(dst + 16), b);
		_mm_stream_si128((__m128i *)(void *)(dst + 32), c);
		_mm_stream_si128((__m128i *)(void *)(dst + 48), d);
	}
	for (; n > 0; n -= 8, dst += 8, src += 8) {
		long long w;
		memcpy(&w, src, 8);
		_mm_stream_si64((long long *)(void *)dst, w);
	}
}
#elif defined(__aarch64__)
#define HAVE_NT 0
/* HWCAP_DCPOP is bit 16, HWCAP2_DCPODP bit 0 (Linux arch/arm64/include/uapi/asm/hwcap.h). QEMU 7.2 in user mode announces both and has neither. */
static enum insn detect(void)
{
	if (!env_is_1("SCM_NO_CVAP")) {
		if (getauxval(AT_HWCAP2) & 1)
			return INSN_CVADP;
		if (getauxval(AT_HWCAP) >> 16 & 1)
			return INSN_CVAP;
	}
	return INSN_CVAC;
}

static void flush_lines(enum insn i, uintptr_t p, uintptr_t end)
{
	uint64_t ctr;
	__asm__("mrs %0, ctr_el0" : "=r"(ctr));
	uintptr_t line = (uintptr_t)4 << (ctr >> 16 & 15); /* DminLine: log2 of the smallest line, in words */
	for (p &= ~(line - 1); p < end; p += line) {
		switch (i) { /* by encoding: assemblers know the names from ARMv8.2 and v8.5 on only */
		case INSN_CVADP: __asm__ volatile("sys #3, c7, c13, #1, %0" : : "r"(p) : "memory"); break;
		case INSN_CVAP: __asm__ volatile("sys #3, c7, c12, #1, %0" : : "r"(p) : "memory"); break;
		case INSN_CVAC: __asm__ volatile("dc cvac, %0" : : "r"(p) : "memory"); break;
		default: break;
		}
	}
}

static void fence(void) { __asm__ volatile("dsb sy" : : : "memory"); }
static void nt_copy(uint8_t *dst, const uint8_t *src, uint64_t n) { memcpy(dst, src, n); }
#else
#define HAVE_NT 0
/* Without an instruction for it there is no cache-line granularity: only msync is offered. */
static enum insn detect(void) { return INSN_NONE; }
static void flush_lines(enum insn i, uintptr_t p, uintptr_t end) { (void)i, (void)p, (void)end; }
static void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static void nt_copy(uint8_t *dst, const uint8_t *src, uint64_t n) { memcpy(dst, src, n); }
#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static enum insn best;
static uint64_t nt_threshold; /* cached copy and flush win below 512 bytes, MOVNTDQ above 1 KiB */

static void init(void)
{
	best = detect();
	nt_threshold = HAVE_NT ? 1024 : UINT64_MAX;
	const char *s = getenv("SCM_MOVNT_THRESHOLD");
	char *end;
	if (env_is_1("SCM_NO_MOVNT")) {
		nt_threshold = UINT64_MAX;
	} else if (HAVE_NT && s && *s >= '0' && *s <= '9') {
		uint64_t n = strtoull(s, &end, 10);
		if (!*end)
			nt_threshold = max64(n, 64);
	}
}

enum insn scmi_best(void)
{
	pthread_once(&once, init);
	return best;
}

const char *scmi_insn_name(enum insn i)
{
	static const char *const names[] = {"none", "clflush", "clflushopt", "clwb", "dc cvac", "dc cvap", "dc cvadp"};
	return names[i];
}

void scmi_mem_init(struct mem *m, void *base, uint64_t size, enum way way)
{
	*m = (struct mem){.base = base, .size = size, .way = way, .insn = scmi_best(), .lo = UINT64_MAX};
	pthread_mutex_init(&m->lock, NULL);
}

/* Starts writing [off, off+n) back; complete after the next fence of this thread. */
void scmi_flush(struct mem *m, uint64_t off, uint64_t n)
{
	if (n == 0)
		return;
	if (m->way == WAY_LINES) {
		flush_lines(m->insn, (uintptr_t)m->base + off, (uintptr_t)m->base + off + n);
	} else if (m->way == WAY_PAGES) {
		pthread_mutex_lock(&m->lock);
		m->lo = min64(m->lo, off);
		m->hi = max64(m->hi, off + n);
		pthread_mutex_unlock(&m->lock);
	}
}

int scmi_fence(struct mem *m)
{
	if (m->way != WAY_PAGES) {
		fence();
		return 0;
	}
	int rc = 0;
	pthread_mutex_lock(&m->lock);
	if (m->err == 0 && m->hi > 0) {
		/* One call from the first to the last: the kernel finds the dirty pages between them cheaply, and pays for a journal commit once. */
		uint64_t lo = m->lo & ~4095ull, hi = min64(align_up(m->hi, 4096), m->size);
		m->lo = UINT64_MAX, m->hi = 0;
		if (msync(m->base + lo, hi - lo, MS_SYNC))
			m->err = errno;
	}
	if (m->err) {
		errno = m->err;
		rc = scmi_error(SCM_E_SYSTEM, "msync: %s", strerror(m->err));
	}
	pthread_mutex_unlock(&m->lock);
	return rc;
}

/* Stores past the cache if n is long; durable after the next fence. */
void scmi_copy_nt(struct mem *m, uint64_t off, const void *from, uint64_t n)
{
	const uint8_t *src = from;
	scmi_best();
	if (m->way == WAY_PAGES || n < nt_threshold) {
		mem_copy(m, off, src, n);
		mem_flush(m, off, n);
		return;
	}
	uint64_t head = min64(-off & 15, n), tail = (n - head) & 7, body = n - head - tail; /* MOVNTDQ wants alignment */
	if (head > 0) {
		mem_copy(m, off, src, head);
		mem_flush(m, off, head);
	}
	nt_copy(m->base + off + head, src + head, body);
	TRACE_STORE(m, 'N', off + head, body);
	if (tail > 0) {
		mem_copy(m, off + n - tail, src + n - tail, tail);
		mem_flush(m, off + n - tail, tail);
	}
}
