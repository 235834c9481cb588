/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

const uint32_t scmi_class_sizes[NCLASSES] = {32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
	3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768, 40960, 49152, 65280, 87040, 130560};

/* Fits a region of the given size. Small regions have small chunks and few lanes, so that most of them is heap. */
int scmi_geometry_new(struct geometry *g, uint64_t size, const struct scm_options *o)
{
	*g = (struct geometry){.size = size, .lanes_off = LANES_AT, .lanes = o->lanes, .lane_size = o->lane_size, .chunk_size = o->chunk_size};
	if (size < MIN_SIZE || size > MAX_SIZE || size % 4096)
		return scmi_error(SCM_E_SIZE, "wrong size: a region has %llu to %llu bytes and a multiple of 4096, not %llu", MIN_SIZE, MAX_SIZE,
				  (unsigned long long)size);
	if (!g->lanes)
		g->lanes = (uint32_t)min64(max64(size >> 18, 2), 64);
	if (!g->lane_size)
		g->lane_size = size < 4 << 20 ? 4 << 10 : 8 << 10;
	if (!g->chunk_size)
		g->chunk_size = size < 4 << 20 ? 16 << 10 : size < 16 << 20 ? 64 << 10 : 256 << 10;
	g->table_off = align_up(g->lanes_off + (uint64_t)g->lanes * g->lane_size, 4096);
	uint64_t align = size >= 64 << 20 ? 2 << 20 : 4096; /* so that chunks do not straddle huge pages */
	for (uint64_t n = min64(size / g->chunk_size, UINT32_MAX); n > 0; n--) {
		g->heap_off = align_up(g->table_off + 8 * n, align);
		g->chunk_count = (uint32_t)n;
		if (g->heap_off + n * g->chunk_size <= size)
			break;
		g->chunk_count = 0;
	}
	const char *bad = scmi_geometry_check(g);
	return bad ? scmi_error(SCM_E_SIZE, "wrong size: %s does not fit", bad) : 0;
}

/* What stands between a hostile header and the rest of the library. */
const char *scmi_geometry_check(const struct geometry *g)
{
	if (g->size < MIN_SIZE || g->size > MAX_SIZE || g->size % 4096)
		return "the size";
	if (g->lanes_off != LANES_AT)
		return "the place of the lanes";
	if (g->lanes < 1 || g->lanes > 1024 || g->lane_size < 512 || g->lane_size > 1 << 20 || g->lane_size % SCM_LINE)
		return "number or size of the lanes";
	if (g->chunk_size < 16 << 10 || g->chunk_size > 16 << 20 || (g->chunk_size & (g->chunk_size - 1)) || g->chunk_count < 1)
		return "number or size of the chunks";
	if (g->table_off % 4096 || g->table_off > g->size || g->table_off < g->lanes_off + (uint64_t)g->lanes * g->lane_size)
		return "the place of the chunk table";
	if (g->heap_off % 4096 || g->heap_off > g->size || g->heap_off < g->table_off + 8ull * g->chunk_count)
		return "the place of the heap";
	if ((uint64_t)g->chunk_count * g->chunk_size > g->size - g->heap_off)
		return "the size of the heap";
	return NULL;
}

int scmi_class_of(const struct geometry *g, uint64_t n)
{
	int lo = 0, hi = NCLASSES;
	while (lo < hi) {
		int mid = (lo + hi) / 2;
		if (scmi_class_sizes[mid] < n)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < NCLASSES && geo_blocks(g, (unsigned)lo) >= 2 ? lo : -1;
}
