/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[768];

static int put(int code, size_t room, const char *fmt, va_list ap)
{
	int n = vsnprintf(message, room, fmt, ap);
	if (n >= (int)room)
		memcpy(message + room - 4, "...", 4);
	return code;
}

int scmi_error(int code, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	put(code, sizeof(message), fmt, ap);
	va_end(ap);
	return code;
}

int scmi_prefix(int code, const char *fmt, ...)
{
	char was[sizeof(message)];
	memcpy(was, message, sizeof(was));
	va_list ap;
	va_start(ap, fmt);
	put(code, 256, fmt, ap);
	va_end(ap);
	size_t n = strlen(message);
	snprintf(message + n, sizeof(message) - n, ": %.*s", (int)(sizeof(message) - n - 3), was);
	return code;
}

const char *scm_errormsg(void) { return message[0] ? message : "no error"; }

const char *scm_strerror(int code)
{
	static const char *const text[] = {
		[-SCM_OK] = "no error",
		[-SCM_E_NOREGION] = "no region",
		[-SCM_E_GRANULARITY] = "persistence is too coarse",
		[-SCM_E_DURABILITY] = "not durable enough",
		[-SCM_E_LOCKED] = "region is in use",
		[-SCM_E_UNFORMATTED] = "region is not formatted",
		[-SCM_E_VERSION] = "region of another format",
		[-SCM_E_LAYOUT] = "region of another layout",
		[-SCM_E_SIZE] = "wrong size",
		[-SCM_E_CORRUPT] = "region is damaged",
		[-SCM_E_UNSAFE] = "memory lost what it had promised to save",
		[-SCM_E_FULL] = "region is full",
		[-SCM_E_TYPE] = "root object of another type",
		[-SCM_E_RANGE] = "outside the region",
		[-SCM_E_FREE] = "not an allocated block",
		[-SCM_E_READONLY] = "region is open read-only",
		[-SCM_E_CLOSED] = "region is closed",
		[-SCM_E_TXDONE] = "transaction has ended",
		[-SCM_E_MEDIA] = "memory fault",
		[-SCM_E_BUSY] = "transactions are running",
		[-SCM_E_SYSTEM] = "system call failed",
		[-SCM_E_INVALID] = "invalid argument",
		[-SCM_E_ADDRESS] = "address is taken",
	};
	if (code > 0 || -code >= (int)(sizeof(text) / sizeof(text[0])))
		return "unknown error";
	return text[-code];
}

/* CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), by the instruction of SSE 4.2 where there is one. */
static uint32_t table[8][256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void table_fill(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
		table[0][i] = c;
	}
	for (uint32_t i = 0; i < 256; i++)
		for (int k = 1; k < 8; k++)
			table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
}

static uint32_t crc_table(uint32_t c, const uint8_t *p, size_t n)
{
	pthread_once(&table_once, table_fill);
	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;
		memcpy(&w, p, 8);
		w ^= c;
		c = table[7][w & 0xff] ^ table[6][w >> 8 & 0xff] ^ table[5][w >> 16 & 0xff] ^ table[4][w >> 24 & 0xff] ^
		    table[3][w >> 32 & 0xff] ^ table[2][w >> 40 & 0xff] ^ table[1][w >> 48 & 0xff] ^ table[0][w >> 56];
	}
	while (n--)
		c = c >> 8 ^ table[0][(c ^ *p++) & 0xff];
	return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_insn(uint32_t c, const uint8_t *p, size_t n)
{
	uint64_t v = c;
	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;
		memcpy(&w, p, 8);
		v = __builtin_ia32_crc32di(v, w);
	}
	c = (uint32_t)v;
	while (n--)
		c = __builtin_ia32_crc32qi(c, *p++);
	return c;
}
#endif

uint32_t scmi_crc32c(const void *p, size_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("sse4.2"))
		return ~crc_insn(~0u, p, n);
#endif
	return ~crc_table(~0u, p, n);
}
