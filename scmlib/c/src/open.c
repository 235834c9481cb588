/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define ALIGN (2ull << 20) /* of the mapping, for huge pages */

static int sys_error(const char *what, const char *path)
{
	int e = errno;
	scmi_error(SCM_E_SYSTEM, "%s region %s: %s", what, path, strerror(e));
	errno = e;
	return SCM_E_SYSTEM;
}

/* All blocks now: a store into a hole of a full file system would be a SIGBUS later. */
static int grow(int fd, const char *path, uint64_t size)
{
	if (fallocate(fd, 0, 0, (off_t)size) && (errno != EOPNOTSUPP || ftruncate(fd, (off_t)size)))
		return sys_error("create", path);
	if (fsync(fd))
		return sys_error("sync", path);
	char *dir = strdup(path), *slash = dir ? strrchr(dir, '/') : NULL;
	if (slash)
		slash[slash == dir] = 0;
	int d = dir ? open(slash ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	free(dir);
	int rc = d < 0 || (fsync(d) && errno != EINVAL) ? sys_error("sync the directory of", path) : 0; /* EINVAL: some filesystems cannot */
	if (d >= 0)
		close(d);
	return rc;
}

static int prepare(int fd, const char *path, const struct scm_options *o, bool *grown)
{
	struct stat st;
	struct geometry g;
	bool ro = o->flags & SCM_OPEN_READONLY;
	if (fstat(fd, &st))
		return sys_error("open", path);
	if (!S_ISREG(st.st_mode))
		return scmi_error(SCM_E_NOREGION, "open region %s: no region: it is not a regular file", path);
	/* An open file description lock belongs to the inode, so it holds across containers and bind mounts, and it ends with the process. */
	struct flock lk = {.l_type = ro ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
	if (fcntl(fd, F_OFD_SETLK, &lk)) {
		if (errno == EAGAIN || errno == EACCES)
			return scmi_error(SCM_E_LOCKED, "open region %s: region is in use: another process has it open", path);
		return sys_error("lock", path);
	}
	if (fstat(fd, &st))
		return sys_error("open", path);
	if (st.st_size)
		return 0;
	if (!(o->flags & SCM_OPEN_CREATE) || ro)
		return scmi_error(SCM_E_UNFORMATTED, "open region %s: region is not formatted: the file is empty", path);
	int rc = scmi_geometry_new(&g, o->size, o);
	if (rc)
		return scmi_prefix(rc, "create region %s", path);
	*grown = true;
	return grow(fd, path, o->size);
}

/* Opens, locks and, if it is to be made, sizes the file. */
static int open_file(const char *path, const struct scm_options *o, int *fd, bool *made, bool *grown)
{
	struct geometry g;
	bool ro = o->flags & SCM_OPEN_READONLY, create = o->flags & SCM_OPEN_CREATE && !ro;
	int flags = (ro ? O_RDONLY : O_RDWR) | O_CLOEXEC;
	*fd = open(path, flags | O_NOCTTY | O_NONBLOCK);
	if (*fd < 0 && errno == ENOENT && create) {
		int rc = o->size ? scmi_geometry_new(&g, o->size, o) : scmi_error(SCM_E_SIZE, "wrong size: no size given");
		if (rc)
			return scmi_prefix(rc, "create region %s", path);
		*fd = open(path, flags | O_CREAT | O_EXCL, 0600);
		*made = *fd >= 0;
	}
	if (*fd < 0 && errno == ENOENT)
		return scmi_error(SCM_E_NOREGION, "open region %s: no region: no such file; make it with SCM_OPEN_CREATE, or give the container a region", path);
	if (*fd < 0)
		return sys_error("open", path);
	return prepare(*fd, path, o, grown);
}

/* The address is a hint, which the kernel follows where there is room. MAP_FIXED_NOREPLACE would say it better, but it is not
 * among the flags that MAP_SHARED_VALIDATE knows (Linux mm/mmap.c, LEGACY_MAP_MASK): with it MAP_SYNC is refused on DAX, too. */
static void *map_at(uintptr_t hint, uint64_t size, int fd, bool ro, bool *map_sync)
{
	int prot = PROT_READ | PROT_WRITE;
	void *p = MAP_FAILED;
	if (!ro) {
		p = mmap((void *)hint, size, prot, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
		*map_sync = p != MAP_FAILED;
	}
	if (p == MAP_FAILED)
		p = mmap((void *)hint, size, prot, ro ? MAP_PRIVATE : MAP_SHARED, fd, 0);
	if (p != MAP_FAILED && hint && p != (void *)hint) { /* something else is there */
		munmap(p, size);
		p = MAP_FAILED;
	}
	return p;
}

/* Maps where the region was mapped last, else at a place that is seldom used, else anywhere aligned. */
static void *map_file(int fd, uint64_t size, bool ro, bool *map_sync)
{
	uint8_t copies[2][HEADER_LEN] = {{0}};
	uint64_t wish = 0;
	if (pread(fd, copies[0], HEADER_LEN, 0) == HEADER_LEN && pread(fd, copies[1], HEADER_LEN, HEADER_SIZE) == HEADER_LEN)
		wish = scmi_header_base(copies);
	void *p = MAP_FAILED;
	if (wish && wish % 4096 == 0 && wish >= 1ull << 32 && wish < 1ull << 47)
		p = map_at((uintptr_t)wish, size, fd, ro, map_sync);
	if (p == MAP_FAILED && !wish) { /* above where programs are loaded, below libraries; one of few ranges that ASan, TSan and MSan all leave to programs */
		uint16_t slot = 0;
		if (getrandom(&slot, sizeof(slot), GRND_NONBLOCK) == sizeof(slot))
			p = map_at((uintptr_t)((0x5657ull + slot % 32) << 32), size, fd, ro, map_sync);
	}
	if (p == MAP_FAILED) {
		uint8_t *room = mmap(NULL, size + ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (room != MAP_FAILED) {
			uintptr_t at = align_up((uintptr_t)room, ALIGN);
			munmap(room, size + ALIGN);
			p = map_at(at, size, fd, ro, map_sync); /* another thread may have been faster */
		}
	}
	return p == MAP_FAILED ? map_at(0, size, fd, ro, map_sync) : p;
}

static scm_region *new_region(const char *path, bool ro, int fd)
{
	scm_region *r = calloc(1, sizeof(*r));
	if (r && !(r->path = strdup(path))) {
		free(r);
		r = NULL;
	}
	if (!r)
		scmi_error(SCM_E_SYSTEM, "open region %s: no memory: %s", path, strerror(errno));
	else
		r->read_only = ro, r->fd = fd;
	return r;
}

static int open_mapped(scm_region **out, const char *path, const struct scm_options *o, int fd)
{
	struct stat st;
	bool ro = o->flags & SCM_OPEN_READONLY, map_sync = false;
	if (fstat(fd, &st))
		return sys_error("open", path);
	uint64_t size = (uint64_t)st.st_size;
	if (size < MIN_SIZE || size > MAX_SIZE)
		return scmi_error(SCM_E_SIZE, "open region %s: wrong size: the file has %llu bytes; a region has %llu to %llu", path,
				  (unsigned long long)size, MIN_SIZE, MAX_SIZE);
	scm_region *r = new_region(path, ro, fd);
	if (!r)
		return SCM_E_SYSTEM;
	void *p = map_file(fd, size, ro, &map_sync);
	int rc = p == MAP_FAILED ? sys_error("map", path) : 0;
	if (!rc) {
		scmi_probe(fd, path, map_sync, o->mode, &r->v);
		if ((rc = scmi_verdict_override(&r->v)) || (rc = scmi_verdict_satisfies(&r->v, o)))
			scmi_prefix(rc, "open region %s", path);
		else if (r->v.forced)
			fprintf(stderr, "libscm: the environment overrides what the mapping of %s gives; data may be lost\n", path);
	}
	if (!rc) {
		scmi_mem_init(&r->mem, p, size, ro || r->v.gran == SCM_GRANULARITY_BYTE ? WAY_FENCE_ONLY :
			      r->v.gran == SCM_GRANULARITY_CACHE_LINE ? WAY_LINES : WAY_PAGES);
		r->base_wish = (uint64_t)(uintptr_t)p;
		r->mode = o->mode;
		if (!(o->flags & SCM_OPEN_NO_SIGBUS))
			scmi_guard_install();
		if ((rc = scmi_attach(r, o)))
			scmi_prefix(rc, "open region %s", path);
	}
	if (rc) {
		if (p != MAP_FAILED)
			munmap(p, size);
		scmi_detach(r);
		return rc;
	}
	*out = r;
	return 0;
}

/* A region in memory of the process. */
static int open_memory(scm_region **out, void *b, uint64_t size, const struct scm_options *o, const char *name)
{
	scm_region *r = new_region(name, o->flags & SCM_OPEN_READONLY, -1);
	if (!r)
		return SCM_E_SYSTEM;
	r->mode = SCM_MODE_DRAM;
	r->v = (struct verdict){.gran = SCM_GRANULARITY_BYTE, .dur = SCM_DURABILITY_VOLATILE, .fstype = "memory", .why = "memory of the process",
		.mount = "memory of the process"};
	scmi_mem_init(&r->mem, b, size, WAY_FENCE_ONLY);
#ifdef SCM_TRACE
	scmi_trace_attach(&r->mem);
#endif
	int rc = scmi_attach(r, o);
	if (rc) {
		scmi_detach(r);
		return scmi_prefix(rc, "open region %s", name);
	}
	*out = r;
	return 0;
}

scm_region *scmi_image_open(void *b, uint64_t size, const struct scm_options *o)
{
	scm_region *r = NULL;
	return open_memory(&r, b, size, o, "(image)") ? NULL : r;
}

static int open_dram(scm_region **out, const struct scm_options *o)
{
	struct geometry g;
	if (o->require_durability > SCM_DURABILITY_VOLATILE)
		return scmi_error(SCM_E_DURABILITY, "open region: not durable enough: more than volatile is required, and mode dram is anonymous memory");
	int rc = scmi_geometry_new(&g, o->size, o);
	if (rc)
		return scmi_prefix(rc, "open region: mode dram");
	void *p = mmap(NULL, o->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return sys_error("map memory for", "(dram)");
	struct scm_options oo = *o;
	oo.flags |= SCM_OPEN_CREATE;
	oo.flags &= ~(uint32_t)(SCM_OPEN_READONLY | SCM_OPEN_SAME_ADDRESS);
	if ((rc = open_memory(out, p, o->size, &oo, "(dram)")))
		munmap(p, o->size);
	else
		strcpy((*out)->v.why, "anonymous memory, by choice of mode dram");
	return rc;
}

int scm_open(scm_region **out, const char *path, const struct scm_options *opts)
{
	struct scm_options o = opts ? *opts : (struct scm_options){0};
	if (!out)
		return scmi_error(SCM_E_INVALID, "open region: the place for the answer is NULL");
	*out = NULL;
	if (o.reserved0 || o.reserved[0] || o.reserved[1] || o.reserved[2] || o.reserved[3] || o.flags > 63 || o.mode > SCM_MODE_DRAM ||
	    o.require_granularity > SCM_GRANULARITY_PAGE || o.require_durability > SCM_DURABILITY_POWER_LOSS)
		return scmi_error(SCM_E_INVALID, "open region: options that this library does not know; zero the structure first");
	int rc = path ? 0 : scmi_env(&path, &o);
	if (rc)
		return rc;
	if (o.mode == SCM_MODE_DRAM)
		return open_dram(out, &o);
	int fd = -1;
	bool made = false, grown = false;
	rc = open_file(path, &o, &fd, &made, &grown);
	if (!rc)
		rc = open_mapped(out, path, &o, fd);
	if (rc) {
		/* What was made is taken back, as long as the lock is held. */
		if (made)
			unlink(path);
		else if (grown && ftruncate(fd, 0))
			scmi_prefix(rc, "and the file stays grown (%s)", strerror(errno));
		if (fd >= 0)
			close(fd);
		return rc;
	}
	scmi_regions_add(*out);
	return 0;
}

static int close_header(void *p)
{
	scm_region *r = p;
	r->hdr.state = STATE_CLOSED;
	return scmi_header_write(&r->mem, &r->hdr);
}

int scm_close(scm_region *r)
{
	if (!r)
		return scmi_error(SCM_E_INVALID, "the region is NULL");
	int failed = atomic_load(&r->failed), rc = 0;
	pthread_mutex_lock(&r->lock);
	uint32_t busy = r->geo.lanes - r->tx_idle;
	pthread_mutex_unlock(&r->lock);
	if (busy && failed != SCM_E_CLOSED) /* in a child of fork they are the parent's */
		return scmi_error(SCM_E_BUSY, "region %s: %u transactions are running", r->path, busy);
	scmi_regions_remove(r);
	if (!failed && !r->read_only)
		rc = scmi_guarded(r, close_header, r);
	if (r->fd >= 0 || r->mode == SCM_MODE_DRAM)
		if (strcmp(r->path, "(image)"))
			munmap(r->mem.base, r->mem.size);
	if (r->fd >= 0)
		close(r->fd);
	scmi_detach(r);
	return rc;
}
