/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Memory and transactions of libscm, for worker.c. The environment says which region. */
#include <scm.h>

static scm_region *region;
static scm_tx *tx;
static char *base;

static const char *memory_open(const char *path, size_t size, struct hello *h)
{
	static const char *const grans[] = {"any", "byte", "cache line", "page"}, *const durs[] = {"any", "volatile", "process crash", "power loss"};
	struct scm_options o = {.flags = SCM_OPEN_CREATE};
	struct scm_info info;
	(void)path, (void)size;
	if (scm_open(&region, NULL, &o) || scm_info(region, &info))
		return scm_errormsg();
	base = info.base;
	*h = (struct hello){grans[info.granularity], durs[info.durability], info.why, info.mount, info.instruction};
	return NULL;
}

static int memory_close(void) { return scm_close(region); }
static inline void *at(uint64_t ref) { return base + ref; }
static inline int tx_begin(void) { return scm_tx_begin(region, &tx); }
static inline int tx_commit(void) { return scm_tx_commit(tx); }
static inline int tx_add(uint64_t ref, size_t n) { return scm_tx_add(tx, at(ref), n); }

static inline int tx_add_many(const uint64_t *refs, size_t count, size_t n)
{
	struct scm_range r[16];
	for (size_t i = 0; i < count; i++)
		r[i] = (struct scm_range){at(refs[i]), n};
	return scm_tx_add_ranges(tx, r, count);
}

static inline int tx_alloc(size_t n, uint64_t *ref)
{
	void *p;
	int rc = scm_tx_alloc(tx, n, &p);
	*ref = rc ? 0 : (uint64_t)((char *)p - base);
	return rc;
}

static inline int persist(uint64_t ref, size_t n) { return scm_persist(region, at(ref), n); }
static const char *why(void) { return scm_errormsg(); }
