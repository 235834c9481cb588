/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The undo log: docs/scm.md, "Lanes" and "Recovery". */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

struct record {
	uint32_t crc, len;
	uint64_t gen;
	uint32_t seq, count;
	uint64_t salt;
};
_Static_assert(sizeof(struct record) == REC_HEAD, "record");

#define OFF_MASK ((1ull << 56) - 1)

/* Ties a record to its region and lane: the log of another region, copied to the same place, is not valid here. */
uint64_t scmi_salt(const uint8_t uuid[16], uint32_t lane)
{
	uint64_t w;
	memcpy(&w, uuid, 8);
	return w ^ lane;
}

size_t scmi_entry(uint8_t *b, uint8_t op, uint64_t off, uint64_t arg, const void *payload, uint64_t n)
{
	uint64_t w[2] = {(uint64_t)op << 56 | off, arg};
	memcpy(b, w, 16);
	if (n) {
		memcpy(b + 16, payload, n);
		memset(b + 16 + n, 0, -n & 7);
	}
	return 16 + align_up(n, 8);
}

void scmi_record_end(uint8_t *b, uint32_t len, uint64_t gen, uint32_t seq, uint32_t count, uint64_t salt)
{
	struct record h = {.len = len, .gen = gen, .seq = seq, .count = count, .salt = salt};
	memcpy(b, &h, REC_HEAD);
	h.crc = scmi_crc32c(b + 4, len - 4);
	memcpy(b, &h.crc, 4);
}

/* Where transactions may write: the root record, the chunk table, the heap. */
bool scmi_undoable(const struct geometry *g, uint64_t off, uint64_t n)
{
	return geo_within(off, n, ROOT_AT, ROOT_AT + SCM_LINE) || geo_within(off, n, g->table_off, g->table_off + 8ull * g->chunk_count) ||
	       geo_in_heap(g, off, n);
}

void scmi_lane_log_free(struct lane_log *l)
{
	for (size_t i = 0; i < l->nbufs; i++)
		free(l->bufs[i]);
	free(l->bufs);
	free(l->es);
	*l = (struct lane_log){0};
}

static int nomem(void) { return scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno)); }

/* b: the entries of one record, in private memory. A right checksum and an impossible content is not the trace of a crash, but damage or malice. */
static int read_entries(scm_region *r, const uint8_t *b, uint64_t len, uint32_t count, struct lane_log *out)
{
	const struct geometry *g = &r->geo;
	for (uint32_t i = 0; i < count; i++) {
		if (len < 16)
			return scmi_error(SCM_E_CORRUPT, "entry %u of %u is cut", i, count);
		uint64_t w[2];
		memcpy(w, b, 16);
		struct entry e = {.op = (uint8_t)(w[0] >> 56), .off = w[0] & OFF_MASK, .arg = w[1], .payload = b + 16};
		bool ok = false;
		b += 16, len -= 16;
		if (e.op == OP_UNDO) {
			if (e.arg == 0 || e.arg > len)
				return scmi_error(SCM_E_CORRUPT, "entry %u: payload of %llu bytes is cut", i, (unsigned long long)e.arg);
			uint64_t skip = min64(align_up(e.arg, 8), len);
			b += skip, len -= skip;
			ok = scmi_undoable(g, e.off, e.arg);
		} else if (e.op == OP_SET || e.op == OP_CLEAR) {
			ok = e.off % 8 == 0 && geo_in_heap(g, e.off, 8) && (e.off - g->heap_off) % g->chunk_size < geo_bitmap(g);
		} else if (e.op == OP_LINK) {
			ok = i == count - 1 && e.off % SCM_LINE == 0 && e.arg >= 2 * SCM_LINE && geo_in_heap(g, e.off, e.arg);
		}
		if (!ok)
			return scmi_error(SCM_E_CORRUPT, "entry %u: operation %u at %llu, argument %llu", i, e.op, (unsigned long long)e.off,
					  (unsigned long long)e.arg);
		if (scmi_tx_reserve(&out->es, &out->cap, out->count + 1, sizeof(e)))
			return nomem();
		out->es[out->count++] = e;
	}
	return 0;
}

/* All entries of all valid records of a lane, in order. It reads, and changes nothing. */
int scmi_lane_read(scm_region *r, uint32_t lane, struct lane_log *out)
{
	const struct mem *m = &r->mem;
	uint64_t base = geo_lane(&r->geo, lane), gen = mem_load64(m, base), salt = scmi_salt(r->hdr.uuid, lane);
	uint64_t pos = base + SCM_LINE, end = base + r->geo.lane_size;
	for (uint32_t seq = 0; pos < end && end - pos >= SCM_LINE; seq++) {
		uint32_t n;
		memcpy(&n, m->base + pos + 4, 4);
		if (n < REC_HEAD || n > end - pos)
			break;
		uint8_t *b = malloc(n); /* read once: the owner of a hostile region must not change it between check and use */
		void **bufs = b ? realloc(out->bufs, (out->nbufs + 1) * sizeof(*bufs)) : NULL;
		if (!bufs) {
			free(b);
			return nomem();
		}
		out->bufs = bufs;
		out->bufs[out->nbufs++] = b;
		memcpy(b, m->base + pos, n);
		struct record h;
		memcpy(&h, b, REC_HEAD);
		if (h.len != n || h.gen != gen || h.seq != seq || h.salt != salt || !verify(h.crc == scmi_crc32c(b + 4, n - 4)))
			break;
		size_t before = out->count;
		int rc = read_entries(r, b + REC_HEAD, n - REC_HEAD, h.count, out);
		if (rc)
			return scmi_prefix(rc, "region is damaged: lane %u, record %u at %llu", lane, seq, (unsigned long long)pos);
		pos += align_up(n, SCM_LINE);
		if (out->count > before && out->es[out->count - 1].op == OP_LINK) {
			pos = out->es[--out->count].off;
			end = pos + out->es[out->count].arg;
		}
	}
	return 0;
}

/* Takes back what the entries tell, last first, and flushes it. Doing it twice does no harm. */
void scmi_undo(scm_region *r, const struct lane_log *l)
{
	struct mem *m = &r->mem;
	for (size_t i = l->count; i-- > 0;) {
		const struct entry *e = &l->es[i];
		switch (e->op) {
		case OP_UNDO:
			mem_copy(m, e->off, e->payload, e->arg);
			mem_flush(m, e->off, e->arg);
			break;
		case OP_SET:
			mem_andnot64(m, e->off, e->arg);
			mem_flush(m, e->off, 8);
			break;
		case OP_CLEAR:
			mem_or64(m, e->off, e->arg);
			mem_flush(m, e->off, 8);
			break;
		}
	}
}

/* What a crash has left in all lanes, and the chunk table as it will be when that is rolled back. Nothing is written. */
static int read_lanes(scm_region *r, struct lane_log *lanes, uint8_t *table)
{
	uint64_t lo = r->geo.table_off, len = 8ull * r->geo.chunk_count;
	memcpy(table, r->mem.base + lo, len);
	for (uint32_t i = 0; i < r->geo.lanes; i++) {
		int rc = scmi_lane_read(r, i, &lanes[i]);
		if (rc)
			return rc;
		for (size_t k = lanes[i].count; k-- > 0;) {
			const struct entry *e = &lanes[i].es[k];
			if (e->op == OP_UNDO && e->off >= lo && e->off < lo + len)
				memcpy(table + (e->off - lo), e->payload, e->arg);
		}
	}
	return 0;
}

static int roll_back(scm_region *r, const struct lane_log *lanes)
{
	struct mem *m = &r->mem;
	for (uint32_t i = 0; i < r->geo.lanes; i++) {
		if (lanes[i].count) {
			r->recovered++;
			scmi_undo(r, &lanes[i]);
		}
	}
	if (r->recovered) {
		int rc = mem_fence(m);
		if (rc)
			return rc;
	}
	/* Not fenced here: the header that is written next does it. */
	for (uint32_t i = 0; i < r->geo.lanes; i++) {
		uint64_t at = geo_lane(&r->geo, i);
		mem_store64(m, at, mem_load64(m, at) + 1);
		mem_flush(m, at, 8);
	}
	return 0;
}

/* Brings the region into the state after the last committed transaction, and marks it as open. All is read and found in order before anything is written. */
int scmi_recover(scm_region *r, bool stale_a)
{
	struct lane_log *lanes = calloc(r->geo.lanes, sizeof(*lanes));
	uint8_t *table = malloc(8ull * r->geo.chunk_count);
	int rc = lanes && table ? read_lanes(r, lanes, table) : nomem();
	if (!rc)
		rc = scmi_heap_new(r, (const uint64_t *)(const void *)table);
	if (!rc)
		rc = roll_back(r, lanes);
	for (uint32_t i = 0; lanes && i < r->geo.lanes; i++)
		scmi_lane_log_free(&lanes[i]);
	free(lanes);
	free(table);
	if (!rc && stale_a)
		rc = scmi_header_heal(&r->mem, &r->hdr);
	if (rc)
		return rc;
	r->hdr.generation++;
	r->hdr.state = STATE_OPEN;
	r->hdr.seen_usc = r->hdr.host_usc;
	if (r->base_wish)
		r->hdr.base = r->base_wish;
	return scmi_header_write(&r->mem, &r->hdr);
}
