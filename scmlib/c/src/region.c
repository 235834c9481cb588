/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

int scmi_broken(scm_region *r)
{
	if (!r)
		return scmi_error(SCM_E_INVALID, "the region is NULL");
	int code = atomic_load_explicit(&r->failed, memory_order_acquire);
	return code ? scmi_error(code, "region %s: %s", r->path, r->failure) : 0;
}

/* Stops all further work: what is in memory may no longer be what is on the medium. The next open recovers. */
int scmi_fail(scm_region *r, int code)
{
	int none = 0;
	scmi_prefix(code, "region %s failed, open it again to recover", r->path);
	if (atomic_load(&r->failed) == none) {
		snprintf(r->failure, sizeof(r->failure), "it has failed, open it again to recover: %s", scm_strerror(code));
		atomic_compare_exchange_strong(&r->failed, &none, code);
	}
	return code;
}

static int format(scm_region *r, const struct scm_options *o)
{
	if (!(o->flags & SCM_OPEN_CREATE) || r->read_only)
		return scmi_error(SCM_E_UNFORMATTED, "region is not formatted: it is all zeros; open it with SCM_OPEN_CREATE to format it");
	struct header h = {.state = STATE_CLOSED, .incompat = o->flags & SCM_OPEN_VOLATILE_HEAP ? INCOMPAT_VOLATILE : 0};
	int rc = scmi_geometry_new(&h.geo, r->mem.size, o);
	if (rc)
		return rc;
	if (o->layout)
		strncpy(h.layout, o->layout, 64);
	if (getrandom(h.uuid, sizeof(h.uuid), 0) != sizeof(h.uuid))
		return scmi_error(SCM_E_SYSTEM, "make uuid: %s", strerror(errno));
	return scmi_header_format(&r->mem, &h);
}

/* Compares the header with what the caller expects and the file gives. */
static int admit(scm_region *r, const struct scm_options *o)
{
	const struct header *h = &r->hdr;
	if (h->geo.size != r->mem.size)
		return scmi_error(SCM_E_SIZE, "wrong size: the region has %llu bytes, its file %llu: it was cut or extended",
				  (unsigned long long)h->geo.size, (unsigned long long)r->mem.size);
	if (o->size && o->size != h->geo.size)
		return scmi_error(SCM_E_SIZE, "wrong size: the region has %llu bytes, not %llu", (unsigned long long)h->geo.size, (unsigned long long)o->size);
	if (o->layout && *o->layout && strcmp(o->layout, h->layout))
		return scmi_error(SCM_E_LAYOUT, "region of another layout: it is \"%s\", not \"%s\"", h->layout, o->layout);
	bool heap = h->incompat & INCOMPAT_VOLATILE;
	if (heap != !!(o->flags & SCM_OPEN_VOLATILE_HEAP) && !r->read_only)
		return scmi_error(SCM_E_LAYOUT, heap ? "region of another layout: it is the volatile heap of a program (libscm_preload)"
						     : "region of another layout: it holds durable data, and is no volatile heap");
	if (h->state == STATE_OPEN && h->host_usc && h->seen_usc && h->host_usc != h->seen_usc && !(o->flags & SCM_OPEN_ACCEPT_UNSAFE))
		return scmi_error(SCM_E_UNSAFE, "memory lost what it had promised to save: unsafe shutdown count was %llu when the region was in use, and is %llu "
				  "now; open it with SCM_OPEN_ACCEPT_UNSAFE to take what is left", (unsigned long long)h->seen_usc, (unsigned long long)h->host_usc);
	return 0;
}

static int make_txs(scm_region *r)
{
	pthread_mutex_init(&r->lock, NULL);
	pthread_cond_init(&r->freed, NULL);
	r->txs = calloc(r->geo.lanes, sizeof(*r->txs));
	if (!r->txs)
		return scmi_error(SCM_E_SYSTEM, "no memory: %s", strerror(errno));
	for (uint32_t i = r->geo.lanes; i-- > 0;) {
		scm_tx *t = &r->txs[i];
		t->r = r;
		t->lane = i;
		t->salt = scmi_salt(r->hdr.uuid, i);
		t->max = scmi_max_record(&r->geo);
		t->next = r->tx_free;
		r->tx_free = t;
	}
	r->tx_idle = r->geo.lanes;
	return 0;
}

struct attach_args {
	scm_region *r;
	const struct scm_options *o;
};

static int attach(void *p)
{
	scm_region *r = ((struct attach_args *)p)->r;
	const struct scm_options *o = ((struct attach_args *)p)->o;
	if (r->mem.size < MIN_SIZE)
		return scmi_error(SCM_E_SIZE, "wrong size: %llu bytes; the smallest region has %llu", (unsigned long long)r->mem.size, MIN_SIZE);
	if (o->layout && strlen(o->layout) > 64)
		return scmi_error(SCM_E_LAYOUT, "region of another layout: name \"%s\" has more than 64 bytes", o->layout);
	int rc = 0;
	bool formatted = scmi_blank(&r->mem), stale_a;
	if (formatted)
		rc = format(r, o);
	if (!rc)
		rc = scmi_header_read(&r->mem, &r->hdr, &stale_a, &r->healed);
	if (rc)
		return rc;
	r->geo = r->hdr.geo;
	r->healed = r->healed && !formatted;
	r->moved = !formatted && r->hdr.base && r->base_wish && r->hdr.base != r->base_wish;
	if ((o->flags & SCM_OPEN_SAME_ADDRESS) && r->moved)
		return scmi_error(SCM_E_ADDRESS, "address %#llx, where it was mapped last, is taken", (unsigned long long)r->hdr.base);
	rc = admit(r, o);
	if (!rc)
		rc = scmi_recover(r, stale_a);
	return rc ? rc : make_txs(r);
}

/* Reads, heals, formats and recovers. Nothing is written before all is found to be in order. */
int scmi_attach(scm_region *r, const struct scm_options *o)
{
	struct attach_args a = {r, o};
	return scmi_guarded(r, attach, &a);
}

void scmi_detach(scm_region *r)
{
	if (r->txs) {
		for (uint32_t i = 0; i < r->geo.lanes; i++) {
			free(r->txs[i].buf);
			free(r->txs[i].ops);
			free(r->txs[i].spans);
			free(r->txs[i].ext);
			free(r->txs[i].words);
		}
		free(r->txs);
		pthread_mutex_destroy(&r->lock);
		pthread_cond_destroy(&r->freed);
	}
	scmi_heap_free(r);
	free(r->path);
	free(r);
}

int scm_info(scm_region *r, struct scm_info *out)
{
	if (!r || !out)
		return scmi_error(SCM_E_INVALID, "the region or the place for the answer is NULL");
	*out = (struct scm_info){.path = r->path, .why = r->v.why, .filesystem = r->v.fstype, .mount = r->v.mount,
		.instruction = r->mem.way == WAY_LINES ? scmi_insn_name(r->mem.insn) : r->mem.way == WAY_PAGES ? "msync" : "none",
		.layout = r->hdr.layout, .mode = r->mode, .granularity = r->v.gran, .durability = r->v.dur, .dax = r->v.dax, .map_sync = r->v.map_sync,
		.eadr = r->v.eadr, .forced = r->v.forced, .read_only = r->read_only, .healed = r->healed, .recovered = r->recovered,
		.lanes = r->geo.lanes, .moved = r->moved, .size = r->geo.size, .generation = r->hdr.generation,
		.free_bytes = scmi_heap_free_bytes(r), .base = r->mem.base};
	memcpy(out->uuid, r->hdr.uuid, 16);
	memcpy(out->parent, r->hdr.parent, 16);
	return 0;
}

int scm_blocks(scm_region *r, int (*fn)(scm_off off, uint64_t size, void *arg), void *arg)
{
	const struct geometry *g = &r->geo;
	int rc = scmi_broken(r);
	for (uint32_t c = 0; c < g->chunk_count && !rc; c++) {
		uint64_t w = mem_load64(&r->mem, geo_word(g, c));
		uint8_t class = (uint8_t)(w >> 8);
		if ((uint8_t)w == CHUNK_LARGE) {
			rc = fn(geo_chunk(g, c), (w >> 32) * g->chunk_size, arg);
		} else if ((uint8_t)w == CHUNK_RUN && class < NCLASSES) {
			for (uint64_t i = 0, n = geo_blocks(g, class); i < n && !rc; i++)
				if (mem_load64(&r->mem, geo_chunk(g, c) + 8 * (i / 64)) >> i % 64 & 1)
					rc = fn(geo_chunk(g, c) + geo_bitmap(g) + i * scmi_class_sizes[class], scmi_class_sizes[class], arg);
		}
	}
	return rc;
}

/* Persistence without transactions ------------------------------------------------------------------------------ */

static int check_range(scm_region *r, const void *addr, size_t n, uint64_t *off)
{
	int rc = scmi_broken(r);
	if (rc)
		return rc;
	*off = (uint64_t)(uintptr_t)addr - (uint64_t)(uintptr_t)r->mem.base;
	if (!geo_in_heap(&r->geo, *off, n))
		return scmi_error(SCM_E_RANGE, "address %p, %zu bytes, is not within the heap of region %s", addr, n, r->path);
	return r->read_only ? scmi_error(SCM_E_READONLY, "region %s is open read-only", r->path) : 0;
}

int scm_flush(scm_region *r, const void *addr, size_t n)
{
	uint64_t off;
	int rc = check_range(r, addr, n, &off);
	if (rc || n == 0)
		return rc;
	struct guard g = {.prev = scmi_guard_top, .r = r};
	if (sigsetjmp(g.env, 0))
		return scmi_media_error(&g);
	scmi_guard_top = &g;
	mem_flush(&r->mem, off, n);
	scmi_guard_top = g.prev;
	return 0;
}

int scm_drain(scm_region *r)
{
	int rc = scmi_broken(r);
	return rc ? rc : region_fence(r);
}

int scm_persist(scm_region *r, const void *addr, size_t n)
{
	int rc = scm_flush(r, addr, n);
	return rc || n == 0 ? rc : region_fence(r);
}

struct copy_args {
	scm_region *r;
	uint64_t off;
	const void *src;
	size_t n;
};

static int copy_nt(void *p)
{
	struct copy_args *a = p;
	scmi_copy_nt(&a->r->mem, a->off, a->src, a->n);
	return 0;
}

int scm_copy_nt(scm_region *r, void *dst, const void *src, size_t n)
{
	struct copy_args a = {r, 0, src, n};
	int rc = check_range(r, dst, n, &a.off);
	return rc || n == 0 ? rc : scmi_guarded(r, copy_nt, &a);
}

void *scm_ptr(scm_region *r, scm_off off) { return r && off && geo_in_heap(&r->geo, off, 1) ? r->mem.base + off : NULL; }

scm_off scm_offset(scm_region *r, const void *addr)
{
	uint64_t off = r ? (uint64_t)(uintptr_t)addr - (uint64_t)(uintptr_t)r->mem.base : 0;
	return r && geo_in_heap(&r->geo, off, 1) ? off : 0;
}

/* Root ---------------------------------------------------------------------------------------------------------- */

struct root_args {
	scm_region *r;
	uint64_t size, type;
	void **out;
};

static int root(void *p)
{
	struct root_args *a = p;
	scm_region *r = a->r;
	uint64_t *rec = (uint64_t *)(void *)(r->mem.base + ROOT_AT);
	if (!rec[0]) {
		scm_tx *t;
		void *b;
		int rc = r->read_only ? scmi_error(SCM_E_READONLY, "region %s is open read-only, and has no root object", r->path) : scm_tx_begin(r, &t);
		if (rc)
			return rc;
		struct span s = {ROOT_AT, 24};
		rc = scm_tx_alloc(t, a->size, &b);
		if (!rc)
			rc = scmi_tx_log(t, &s, 1);
		if (rc) {
			scm_tx_abort(t);
			return rc;
		}
		rec[0] = scm_offset(r, b), rec[1] = a->size, rec[2] = a->type;
		if ((rc = scm_tx_commit(t)))
			return rc;
	} else if ((a->type && rec[2] && rec[2] != a->type) || (a->size && rec[1] != a->size)) {
		return scmi_error(SCM_E_TYPE, "region %s: the root object has %llu bytes and type %#llx, not %llu bytes and type %#llx", r->path,
				  (unsigned long long)rec[1], (unsigned long long)rec[2], (unsigned long long)a->size, (unsigned long long)a->type);
	} else if (!geo_in_heap(&r->geo, rec[0], rec[1]) || rec[0] % 8) {
		return scmi_error(SCM_E_CORRUPT, "region %s is damaged: root at %llu, %llu bytes", r->path, (unsigned long long)rec[0], (unsigned long long)rec[1]);
	}
	*a->out = r->mem.base + rec[0];
	return 0;
}

static pthread_mutex_t root_lock = PTHREAD_MUTEX_INITIALIZER;

int scm_root(scm_region *r, size_t size, uint64_t type, void **out)
{
	int rc = scmi_broken(r);
	if (rc)
		return rc;
	if (!out)
		return scmi_error(SCM_E_INVALID, "the place for the answer is NULL");
	struct root_args a = {r, size, type, out};
	pthread_mutex_lock(&root_lock);
	rc = scmi_guarded(r, root, &a);
	pthread_mutex_unlock(&root_lock);
	return rc;
}
