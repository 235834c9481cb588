/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * scm: persistent memory for applications.
 *
 * A region is a file mapped into the address space, on byte-addressable storage class memory where there is some.
 * The program allocates and updates data there with loads and stores, and after a crash at any instruction the
 * next open finds a consistent state. See scm(3) for the guarantee, its limits, and examples.
 *
 * Functions that can fail return 0 or a negative enum scm_error; scm_errormsg() then tells what is wrong and where.
 * A region may be used by many threads, a transaction by one at a time. Transactions are atomic against crashes, not
 * against each other: threads that change the same data hold a lock of their own until the commit has returned.
 */
#ifndef SCM_H
#define SCM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SCM_API __attribute__((visibility("default")))
#else
#define SCM_API
#endif

typedef struct scm_region scm_region;
typedef struct scm_tx scm_tx;

/* A place in a region, in bytes from its start. It stays true wherever the region is mapped. 0 is nil. */
typedef uint64_t scm_off;

/* What scm_persist costs: a fence; flush and fence; msync. Smaller is finer. */
enum scm_granularity { SCM_GRANULARITY_ANY, SCM_GRANULARITY_BYTE, SCM_GRANULARITY_CACHE_LINE, SCM_GRANULARITY_PAGE };

/* What survives once scm_persist or scm_tx_commit has returned 0. Greater is more. */
enum scm_durability { SCM_DURABILITY_ANY, SCM_DURABILITY_VOLATILE, SCM_DURABILITY_PROCESS_CRASH, SCM_DURABILITY_POWER_LOSS };

/* Where the region lies: as SCM_MODE in the environment. AUTO takes the best the file gives. */
enum scm_mode { SCM_MODE_AUTO, SCM_MODE_MAPPING, SCM_MODE_VOLUME, SCM_MODE_STORAGE, SCM_MODE_DRAM };

enum scm_error {
	SCM_OK = 0,
	SCM_E_NOREGION = -1,    /* no such file, or the environment names none */
	SCM_E_GRANULARITY = -2, /* the mapping is coarser than required */
	SCM_E_DURABILITY = -3,  /* less survives than required */
	SCM_E_LOCKED = -4,      /* another process, or another handle, has it open */
	SCM_E_UNFORMATTED = -5, /* all zeros, and SCM_OPEN_CREATE was not given */
	SCM_E_VERSION = -6,     /* another format, or features this library does not know */
	SCM_E_LAYOUT = -7,      /* another program's data */
	SCM_E_SIZE = -8,
	SCM_E_CORRUPT = -9,     /* nothing was changed */
	SCM_E_UNSAFE = -10,     /* the platform lost what it had promised to save */
	SCM_E_FULL = -11,
	SCM_E_TYPE = -12,       /* the root object is another than expected */
	SCM_E_RANGE = -13,      /* not within the heap of the region */
	SCM_E_FREE = -14,       /* no allocated block starts there, or it is being freed already */
	SCM_E_READONLY = -15,
	SCM_E_CLOSED = -16,     /* failed before, or a fork: this process is not the one that opened it */
	SCM_E_TXDONE = -17,
	SCM_E_MEDIA = -18,      /* SIGBUS: a bad block, or the file was cut or has no space behind it */
	SCM_E_BUSY = -19,       /* transactions are running */
	SCM_E_SYSTEM = -20,     /* a system call failed; errno tells which way */
	SCM_E_INVALID = -21,    /* an argument makes no sense */
	SCM_E_ADDRESS = -22     /* SCM_OPEN_SAME_ADDRESS, and that address is taken */
};

enum scm_open_flag {
	SCM_OPEN_CREATE = 1,         /* make the file if there is none, format it if it is all zeros */
	SCM_OPEN_READONLY = 2,       /* a private view, recovered in memory; the file is not changed */
	SCM_OPEN_ACCEPT_UNSAFE = 4,  /* open although the platform lost what it had promised to save */
	SCM_OPEN_SAME_ADDRESS = 8,   /* for raw pointers within the region: fail rather than map elsewhere than last time */
	SCM_OPEN_NO_SIGBUS = 16,     /* install no handler; a memory fault then ends the process */
	SCM_OPEN_VOLATILE_HEAP = 32  /* the content means nothing after the process ends; never opens a durable region */
};

/* Zero it, then set what matters. */
struct scm_options {
	uint32_t flags;               /* enum scm_open_flag */
	uint32_t mode;                /* enum scm_mode */
	uint64_t size;                /* bytes, a multiple of 4096: needed to make a file; must fit one that exists */
	uint32_t require_granularity; /* or finer, else the open fails */
	uint32_t require_durability;  /* or more, else the open fails */
	const char *layout;           /* name of the program's data layout, at most 64 bytes; NULL takes any */
	uint32_t lanes;               /* transactions at a time; for new regions; 0 takes what suits the size */
	uint32_t lane_size;
	uint32_t chunk_size;
	uint32_t reserved0;
	uint64_t reserved[4];
};

/* What a region is. The strings are valid until scm_close. */
struct scm_info {
	const char *path;
	const char *why;         /* how granularity and durability were found */
	const char *filesystem;  /* type, such as ext4 */
	const char *mount;       /* source and mount point */
	const char *instruction; /* that writes lines back */
	const char *layout;
	uint32_t mode, granularity, durability;
	uint32_t dax, map_sync, eadr, forced; /* statx says DAX; MAP_SYNC was accepted; caches are safe; the environment overrode */
	uint32_t read_only, healed;           /* healed: this open wrote a bad copy of the header again */
	uint32_t recovered;                   /* transactions that this open rolled back */
	uint32_t lanes;
	uint32_t moved;                       /* mapped elsewhere than last time: raw pointers within it are wrong */
	uint64_t size, generation;
	uint64_t free_bytes;                  /* in chunks that nothing uses, without those that are kept for the log of commits */
	void *base;
	unsigned char uuid[16], parent[16];
	uint64_t reserved[4];
};

struct scm_range {
	const void *addr;
	size_t len;
};

/* Open and close ------------------------------------------------------------------------------------------------ */

/* Maps the region in the file at path and recovers it; path NULL: the one that the environment names. One process at a
 * time may have it open for writing. Every refusal leaves the file as it was. o may be NULL. */
SCM_API int scm_open(scm_region **out, const char *path, const struct scm_options *o);

/* Marks the region as closed and unmaps it. SCM_E_BUSY, with nothing done, while transactions run. */
SCM_API int scm_close(scm_region *r);

SCM_API int scm_info(scm_region *r, struct scm_info *out);

/* What the last failure in this thread was, with the file, the offset or the mount. Valid until the next failure. */
SCM_API const char *scm_errormsg(void);
SCM_API const char *scm_strerror(int code);

/* Persistence without transactions ------------------------------------------------------------------------------ */

SCM_API int scm_persist(scm_region *r, const void *addr, size_t n); /* flush and drain */
SCM_API int scm_flush(scm_region *r, const void *addr, size_t n);   /* begins; complete after the next drain of this thread */
SCM_API int scm_drain(scm_region *r);
/* Stores past the cache where that is faster; complete after the next drain. Not undone by transactions. */
SCM_API int scm_copy_nt(scm_region *r, void *dst, const void *src, size_t n);

/* Pointers ------------------------------------------------------------------------------------------------------ */

SCM_API void *scm_ptr(scm_region *r, scm_off off);           /* NULL if off is 0 or not in the heap */
SCM_API scm_off scm_offset(scm_region *r, const void *addr); /* 0 if addr is not in the heap */
/* The object by which everything else is found; zeroed the first time. type 0 is not checked. */
SCM_API int scm_root(scm_region *r, size_t size, uint64_t type, void **out);
/* Calls fn for each allocated block in order of offset, until it returns other than 0. No transaction may run meanwhile. */
SCM_API int scm_blocks(scm_region *r, int (*fn)(scm_off off, uint64_t size, void *arg), void *arg);
/* Runs fn; a memory fault within the region makes it return SCM_E_MEDIA. Locks and memory that fn holds then stay so. */
SCM_API int scm_guard(scm_region *r, int (*fn)(void *arg), void *arg);

/* Transactions -------------------------------------------------------------------------------------------------- */

/* Waits while as many transactions run as the region has lanes. */
SCM_API int scm_tx_begin(scm_region *r, scm_tx **out);
/* These ranges will be changed: a rollback restores what they hold now. Name all in one call: it costs one fence. */
SCM_API int scm_tx_add(scm_tx *tx, const void *addr, size_t n);
SCM_API int scm_tx_add_ranges(scm_tx *tx, const struct scm_range *ranges, size_t count);
/* Written by this transaction, durable with it, not restored: slots that nothing referred to when it began. */
SCM_API int scm_tx_dirty(scm_tx *tx, const void *addr, size_t n);
/* n zeroed bytes, aligned to 64, or to 32 if they are 32 or less; gone again if the transaction does not commit. */
SCM_API int scm_tx_alloc(scm_tx *tx, size_t n, void **out);
SCM_API int scm_tx_free(scm_tx *tx, void *addr); /* at the commit; the content stays until then */
/* 0: all is durable, as far as scm_info says. Else all was taken back. The transaction has ended either way. */
SCM_API int scm_tx_commit(scm_tx *tx);
SCM_API int scm_tx_abort(scm_tx *tx);

/* Allocation in one step, without a leak: the block and *slot, which lies in the region, change together. */
SCM_API int scm_alloc_to(scm_region *r, scm_off *slot, size_t n);
SCM_API int scm_free_from(scm_region *r, scm_off *slot);

/* The region that the environment names (SCM_REGION, SCM_MODE, SCM_SIZE), opened at the first call ------------------ */

SCM_API scm_region *scm_default(void);               /* NULL: see scm_errormsg and errno */
SCM_API void *scmalloc(size_t n);                    /* NULL and errno. A crash before the program has stored the pointer leaks */
SCM_API void scmfree(void *addr);                    /* an address that is no block is reported on stderr and ends the process */
SCM_API int scmsync(const void *addr, size_t n);     /* durable when it returns 0; -1 and errno */
SCM_API void *scmroot(size_t n);

#ifdef __cplusplus
}
#endif

#endif
