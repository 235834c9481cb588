/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

/* One copy of the header as it lies on the medium. */
struct raw {
	char magic[8];
	uint32_t byte_order;
	uint16_t version, header_len;
	uint32_t incompat, compat;
	uint64_t size;
	uint8_t uuid[16], parent[16];
	char layout[64];
	uint64_t lanes_off;
	uint32_t lane_count, lane_size;
	uint64_t table_off, heap_off;
	uint32_t chunk_size, chunk_count;
	uint64_t base, seq, generation;
	uint32_t state, reserved0;
	uint64_t host_usc, seen_usc;
	uint8_t host_dev[16];
	uint8_t reserved[276];
	uint32_t crc;
};
_Static_assert(sizeof(struct raw) == HEADER_LEN, "header");
_Static_assert(offsetof(struct raw, lanes_off) == 128 && offsetof(struct raw, base) == 168 && offsetof(struct raw, host_usc) == 200 &&
		       offsetof(struct raw, crc) == 508, "header");

static const char magic[8] = {'S', 'C', 'M', 'R', 'E', 'G', 'N', '1'};

static void encode(const struct header *h, struct raw *b)
{
	memset(b, 0, sizeof(*b));
	memcpy(b->magic, magic, 8);
	b->byte_order = 0x01020304;
	b->version = 1;
	b->header_len = HEADER_LEN;
	b->incompat = h->incompat, b->compat = h->compat;
	b->size = h->geo.size;
	memcpy(b->uuid, h->uuid, 16);
	memcpy(b->parent, h->parent, 16);
	memcpy(b->layout, h->layout, 64);
	b->lanes_off = h->geo.lanes_off, b->lane_count = h->geo.lanes, b->lane_size = h->geo.lane_size;
	b->table_off = h->geo.table_off, b->heap_off = h->geo.heap_off;
	b->chunk_size = h->geo.chunk_size, b->chunk_count = h->geo.chunk_count;
	b->base = h->base, b->seq = h->seq, b->generation = h->generation, b->state = h->state;
	b->host_usc = h->host_usc, b->seen_usc = h->seen_usc;
	memcpy(b->host_dev, h->host_dev, 16);
	b->crc = scmi_crc32c(b, 508);
}

/* b is a private copy: a hostile process must not change it between check and use. */
static int decode(const struct raw *b, struct header *h)
{
	memset(h, 0, sizeof(*h));
	if (memcmp(b->magic, magic, 8))
		return scmi_error(SCM_E_CORRUPT, "region is damaged: no region header");
	if (b->byte_order == 0x04030201)
		return scmi_error(SCM_E_VERSION, "region of another format: written by a big-endian machine");
	if (!verify(b->crc == scmi_crc32c(b, 508))) {
		/* A future version may checksum in another way: say so rather than "damaged". Both refuse. */
		if (b->version != 1 && b->byte_order == 0x01020304)
			return scmi_error(SCM_E_VERSION, "region of another format: version %u, this library knows 1", b->version);
		return scmi_error(SCM_E_CORRUPT, "region is damaged: header checksum");
	}
	if (b->byte_order != 0x01020304)
		return scmi_error(SCM_E_CORRUPT, "region is damaged: byte order mark %#x", b->byte_order);
	if (b->version != 1 || b->header_len != HEADER_LEN)
		return scmi_error(SCM_E_VERSION, "region of another format: version %u, this library knows 1", b->version);
	h->incompat = b->incompat, h->compat = b->compat;
	h->geo = (struct geometry){b->size, b->lanes_off, b->lane_count, b->lane_size, b->table_off, b->heap_off, b->chunk_size, b->chunk_count};
	memcpy(h->uuid, b->uuid, 16);
	memcpy(h->parent, b->parent, 16);
	memcpy(h->layout, b->layout, 64);
	h->base = b->base, h->seq = b->seq, h->generation = b->generation, h->state = b->state;
	h->host_usc = b->host_usc, h->seen_usc = b->seen_usc;
	memcpy(h->host_dev, b->host_dev, 16);
	if (h->incompat & ~(uint32_t)INCOMPAT_KNOWN)
		return scmi_error(SCM_E_VERSION, "region of another format: unknown features %#x", h->incompat & ~(uint32_t)INCOMPAT_KNOWN);
	const char *bad = scmi_geometry_check(&h->geo);
	if (bad)
		return scmi_error(SCM_E_CORRUPT, "region is damaged: header: %s is impossible", bad);
	if (h->state != STATE_CLOSED && h->state != STATE_OPEN)
		return scmi_error(SCM_E_CORRUPT, "region is damaged: header: state %u", h->state);
	return 0;
}

/* stale_a: what counts is not copy A as it stands. healed: a copy was bad. */
int scmi_header_read(struct mem *m, struct header *h, bool *stale_a, bool *healed)
{
	struct raw copy[2];
	struct header hs[2];
	int errs[2];
	for (int i = 0; i < 2; i++) {
		memcpy(&copy[i], m->base + (size_t)i * HEADER_SIZE, HEADER_LEN);
		errs[i] = decode(&copy[i], &hs[i]);
	}
	int pick = !errs[0] && !errs[1] ? hs[1].seq > hs[0].seq : !errs[0] ? 0 : 1;
	*healed = errs[0] || errs[1];
	*stale_a = pick == 1;
	if (!errs[pick]) {
		*h = hs[pick];
		return 0;
	}
	/* "Other version" says more than "damaged". */
	pick = errs[0] == SCM_E_VERSION ? 0 : 1;
	return scmi_prefix(decode(&copy[pick], h), "both copies of the header are bad");
}

uint64_t scmi_header_base(const uint8_t copies[2][HEADER_LEN])
{
	for (int i = 0; i < 2; i++) {
		struct raw b;
		struct header h;
		memcpy(&b, copies[i], HEADER_LEN);
		if (!decode(&b, &h))
			return h.base;
	}
	return 0;
}

/* Copy B, then copy A: at any moment one of them is whole on the medium. */
int scmi_header_write(struct mem *m, struct header *h)
{
	h->seq++;
	struct raw b;
	encode(h, &b);
	mem_copy(m, HEADER_SIZE, &b, HEADER_LEN);
	mem_flush(m, HEADER_SIZE, HEADER_LEN);
	int rc = mem_fence(m);
	if (rc)
		return rc;
	mem_copy(m, 0, &b, HEADER_LEN);
	mem_flush(m, 0, HEADER_LEN);
	return mem_fence(m);
}

/* Writes copy A again from the good copy B. It must come before scmi_header_write, which overwrites copy B first. */
int scmi_header_heal(struct mem *m, const struct header *h)
{
	struct raw b;
	encode(h, &b);
	mem_copy(m, 0, &b, HEADER_LEN);
	mem_flush(m, 0, HEADER_LEN);
	return mem_fence(m);
}

/* Was the memory never used: both magics zero (so a format that was cut short is blank), and all behind the headers? */
bool scmi_blank(const struct mem *m)
{
	if (mem_load64(m, 0) || mem_load64(m, HEADER_SIZE))
		return false;
	static const uint8_t zero[4096];
	for (uint64_t off = ROOT_AT; off < m->size; off += 4096)
		if (memcmp(m->base + off, zero, min64(4096, m->size - off)))
			return false;
	return true;
}

/* Copy A, its magic last and behind a fence. Cut short, the region is blank still, or has one good copy. The open that formats goes on to write copy B. */
int scmi_header_format(struct mem *m, const struct header *h)
{
	struct raw b;
	encode(h, &b);
	mem_copy(m, 8, (const uint8_t *)&b + 8, HEADER_LEN - 8);
	mem_flush(m, 8, HEADER_LEN - 8);
	int rc = mem_fence(m);
	if (rc)
		return rc;
	uint64_t w;
	memcpy(&w, b.magic, 8);
	mem_store64(m, 0, w);
	mem_flush(m, 0, 8);
	return mem_fence(m);
}
