/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* The same of libpmemobj. It has no call that takes several ranges; each is fenced by itself. */
#include <errno.h>
#include <libpmemobj.h>

static PMEMobjpool *region;
static char *base;

static const char *memory_open(const char *path, size_t size, struct hello *h)
{
	region = pmemobj_create(path, "bench", size, 0600);
	if (!region)
		return pmemobj_errormsg();
	base = (char *)region;
	*h = (struct hello){"cache line", "", "libpmemobj; PMEM_IS_PMEM_FORCE makes it take any mapping for persistent memory", path, ""};
	return NULL;
}

static int memory_close(void)
{
	pmemobj_close(region);
	return 0;
}

/* An object is known by pool and offset; in one pool the offset is enough. */
static inline PMEMoid oid(uint64_t ref) { return (PMEMoid){pmemobj_oid(base + ref).pool_uuid_lo, ref}; }
static uint64_t pool_id;
static inline PMEMoid quick_oid(uint64_t ref)
{
	if (!pool_id)
		pool_id = oid(ref).pool_uuid_lo;
	return (PMEMoid){pool_id, ref};
}

static inline void *at(uint64_t ref) { return base + ref; }
static inline int tx_begin(void) { return pmemobj_tx_begin(region, NULL, TX_PARAM_NONE); }

static inline int tx_commit(void)
{
	pmemobj_tx_commit();
	return pmemobj_tx_end();
}

static inline int tx_add(uint64_t ref, size_t n) { return pmemobj_tx_add_range(quick_oid(ref), 0, n); }

static inline int tx_add_many(const uint64_t *refs, size_t count, size_t n)
{
	for (size_t i = 0; i < count; i++) {
		int rc = tx_add(refs[i], n);
		if (rc)
			return rc;
	}
	return 0;
}

static inline int tx_alloc(size_t n, uint64_t *ref)
{
	PMEMoid o = pmemobj_tx_zalloc(n, 1);
	*ref = o.off;
	return OID_IS_NULL(o) ? errno : 0;
}

static inline int persist(uint64_t ref, size_t n)
{
	pmemobj_persist(region, at(ref), n);
	return 0;
}

static const char *why(void) { return pmemobj_errormsg(); }
