/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Where the heap lies, and what becomes of it at fork. */
#include "preload.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include "internal.h"

#define API __attribute__((visibility("default")))
#define H scmp_heap

/* In the first page of the heap, which is never handed out: whose heap this is, for programs that its owner starts. */
struct owner {
	char magic[8];
	int64_t pid;
};
static const char owner_magic[8] = {'S', 'C', 'M', 'H', 'E', 'A', 'P', '1'};

enum { NONE, BUSY, READY };
static _Atomic int state;
static __thread bool in_setup;
static scm_region *region;
static bool deny_fork;

static void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *fmt, ...)
{
	char text[1024];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(text, sizeof(text) - 1, fmt, ap);
	va_end(ap);
	n = n < (int)sizeof(text) - 1 ? n : (int)sizeof(text) - 2;
	text[n++] = '\n';
	if (write(2, text, (size_t)n) < 0)
		return;
}

static bool env_is(const char *name, const char *value)
{
	const char *s = getenv(name);
	return s && !strcmp(s, value);
}

static bool use(void *base, uint64_t size, bool in_region)
{
	uint64_t pages = size / PAGE < UINT32_MAX ? size / PAGE : UINT32_MAX;
	void *meta = mmap(NULL, pages * sizeof(struct page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (meta == MAP_FAILED)
		return false;
	H.page = meta;
	H.base = base;
	H.top = 1;
	H.in_region = in_region;
	H.pages = (uint32_t)pages;
	return true;
}

/* As much address space as there may be; memory is taken when it is touched. */
static void use_dram(void)
{
	for (uint64_t size = 1ull << 38; size >= 64ull << 20; size /= 2) {
		void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p != MAP_FAILED && use(p, size, false))
			return;
		if (p != MAP_FAILED)
			munmap(p, size);
	}
	say("libscm_preload: no memory");
	_exit(127);
}

static int64_t parent_of(int64_t pid)
{
	char path[64], text[512];
	snprintf(path, sizeof(path), "/proc/%lld/stat", (long long)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	const char *end = strrchr(text, ')'); /* the name may hold anything */
	long long ppid = 0;
	return end && sscanf(end + 1, " %*c %lld", &ppid) == 1 ? ppid : 0;
}

/* Is the region, which is locked, the heap of a process that has started this one? */
static bool of_ancestor(const char *path)
{
	uint8_t copy[2][HEADER_LEN] = {{0}};
	struct mem m = {0};
	struct header h;
	bool stale, healed;
	struct owner o = {{0}, 0};
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return false;
	uint8_t *both = calloc(2, HEADER_SIZE);
	bool ok = both && pread(fd, copy[0], HEADER_LEN, 0) == HEADER_LEN && pread(fd, copy[1], HEADER_LEN, HEADER_SIZE) == HEADER_LEN;
	if (ok) {
		memcpy(both, copy[0], HEADER_LEN);
		memcpy(both + HEADER_SIZE, copy[1], HEADER_LEN);
		m.base = both, m.size = 2 * HEADER_SIZE;
		ok = !scmi_header_read(&m, &h, &stale, &healed) && pread(fd, &o, sizeof(o), (off_t)h.geo.heap_off) == sizeof(o) &&
		     !memcmp(o.magic, owner_magic, 8);
	}
	close(fd);
	if (!ok)
		return false;
	const char *env = getenv("SCM_PRELOAD_OWNER");
	if (env && strtoll(env, NULL, 10) == o.pid)
		return true;
	for (int64_t pid = getpid(), depth = 0; pid > 1 && depth < 1000; depth++)
		if ((pid = parent_of(pid)) == o.pid)
			return true;
	return false;
}

static void choose(void)
{
	struct scm_options opt = {.flags = SCM_OPEN_CREATE | SCM_OPEN_ACCEPT_UNSAFE | SCM_OPEN_NO_SIGBUS | SCM_OPEN_VOLATILE_HEAP};
	const char *path = NULL;
	int rc = scmi_env(&path, &opt);
	if (!rc && opt.mode == SCM_MODE_DRAM) {
		use_dram();
		return;
	}
	if (!rc)
		rc = scm_open(&region, path, &opt);
	if (!rc) {
		struct owner *o = (struct owner *)(void *)(region->mem.base + region->geo.heap_off);
		memcpy(o->magic, owner_magic, 8);
		o->pid = getpid();
		if (use(o, geo_heap_end(&region->geo) - region->geo.heap_off, true))
			return;
		say("libscm_preload: no memory for the page table of the heap");
		_exit(127);
	}
	/* Programs that the owner of the heap starts run on ordinary memory. Nobody else does so without being told. */
	bool told = env_is("SCM_PRELOAD_FALLBACK", "1"), child = rc == SCM_E_LOCKED && of_ancestor(path);
	if (!child) {
		say("libscm_preload: %s%s", scm_errormsg(), told ? "; the heap of this process lies in ordinary memory" :
		    "; the program is not started (SCM_PRELOAD_FALLBACK=1: start it on ordinary memory)");
		if (!told)
			_exit(127);
	}
	use_dram();
}

/* Fork: the heap is a shared mapping, so parent and child would change each other's. The child gets a copy, made while the parent waits. */
static struct {
	uint8_t *at;
	size_t room, len;
} copy;

static bool make_room(size_t len)
{
	if (copy.room >= len)
		return true;
	if (copy.room)
		munmap(copy.at, copy.room);
	copy.at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	copy.room = copy.at == MAP_FAILED ? 0 : len;
	if (copy.room)
		madvise(copy.at, len, MADV_HUGEPAGE); /* most of the time goes into page faults; a kernel without them does as before */
	return copy.room > 0;
}

static void prepare(void)
{
	scmp_lock_all();
	copy.len = 0;
	if (H.in_region && make_room((size_t)H.top * PAGE)) {
		copy.len = (size_t)H.top * PAGE;
		memcpy(copy.at, H.base, copy.len);
	}
}

static void in_parent(void)
{
	if (copy.room)
		munmap(copy.at, copy.room);
	copy.room = 0;
	scmp_unlock_all(false);
}

static void in_child(void)
{
	if (H.in_region) {
		size_t all = (size_t)H.pages * PAGE;
		if (!copy.len || mmap(H.base, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != H.base ||
		    mremap(copy.at, copy.len, copy.len, MREMAP_MAYMOVE | MREMAP_FIXED, H.base) != H.base) {
			say("libscm_preload: no memory to copy the heap for a child process");
			_exit(127);
		}
		if (copy.room > copy.len)
			munmap(copy.at + copy.len, copy.room - copy.len);
		copy.room = 0;
		H.in_region = false;
		close(region->fd); /* the lock is the parent's alone */
		region->fd = -1;
	}
	scmp_unlock_all(true);
}

/* fork itself can say that there is no memory; forks from within the C library (daemon, forkpty) end the child instead. */
API pid_t fork(void)
{
	static pid_t (*real)(void);
	if (!real) {
		void *p = dlsym(RTLD_NEXT, "fork");
		memcpy(&real, &p, sizeof(real));
	}
	if (scmp_ready() && H.in_region) {
		pthread_mutex_lock(&H.lock);
		size_t len = (size_t)H.top * PAGE;
		bool ok = !deny_fork;
		pthread_mutex_unlock(&H.lock);
		if (ok) { /* whether there is room; what is used is made with all locks held */
			void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			ok = p != MAP_FAILED;
			if (ok)
				munmap(p, len);
		}
		if (!ok) {
			errno = ENOMEM;
			return -1;
		}
	}
	return real();
}

bool scmp_ready(void)
{
	if (atomic_load_explicit(&state, memory_order_acquire) == READY)
		return true;
	if (in_setup || !environ) /* the dynamic linker allocates before there is an environment */
		return false;
	int none = NONE;
	if (!atomic_compare_exchange_strong(&state, &none, BUSY)) {
		while (atomic_load_explicit(&state, memory_order_acquire) != READY)
			usleep(100);
		return true;
	}
	in_setup = true;
	int saved = errno;
	deny_fork = env_is("SCM_FORK", "deny");
	const char *s = getenv("SCM_FORK");
	if (s && *s && !deny_fork && strcmp(s, "copy")) {
		say("libscm_preload: SCM_FORK=%s: use copy or deny", s);
		_exit(127);
	}
	/* First of all handlers: it then runs last before the fork, when other handlers no longer allocate, and first after it. */
	pthread_atfork(prepare, in_parent, in_child);
	choose();
	errno = saved;
	in_setup = false;
	atomic_store_explicit(&state, READY, memory_order_release);
	return true;
}

__attribute__((constructor)) static void begin(void)
{
	if (!scmp_ready() || !H.in_region)
		return;
	char pid[32];
	snprintf(pid, sizeof(pid), "%lld", (long long)getpid());
	setenv("SCM_PRELOAD_OWNER", pid, 1);
	if (env_is("SCM_PRELOAD_VERBOSE", "1"))
		say("libscm_preload: the heap of process %s lies in %s, %llu bytes", pid, region->path, (unsigned long long)H.pages * PAGE);
}

__attribute__((destructor)) static void end(void)
{
	if (H.in_region && env_is("SCM_PRELOAD_VERBOSE", "1"))
		say("libscm_preload: %llu bytes of the region were used, %llu are now", (unsigned long long)H.top * PAGE, (unsigned long long)H.large * PAGE);
}
