/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Memory faults as errors, and what becomes of regions in a child of fork. */
#include "internal.h"

#include <signal.h>
#include <unistd.h>

/* Reached from a signal handler: no lazy allocation. */
_Thread_local struct guard *scmi_guard_top __attribute__((tls_model("initial-exec")));
_Thread_local pthread_mutex_t *scmi_held __attribute__((tls_model("initial-exec")));

static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_sigbus(int sig, siginfo_t *si, void *uc)
{
	for (struct guard *g = scmi_guard_top; g; g = g->prev) {
		uint64_t off = (uint64_t)(uintptr_t)si->si_addr - (uint64_t)(uintptr_t)g->r->mem.base;
		if (off < g->r->mem.size) {
			g->fault = off;
			siglongjmp(g->env, 1);
		}
	}
	if (before.sa_flags & SA_SIGINFO) {
		before.sa_sigaction(sig, si, uc);
	} else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
		before.sa_handler(sig);
	} else { /* nobody else's either: the access is made again, and ends the process as if we were not here */
		struct sigaction dfl = {.sa_handler = SIG_DFL};
		sigaction(sig, &dfl, NULL);
	}
}

static void install(void)
{
	/* SA_NODEFER: the handler is left by a longjmp that restores no mask, which is what makes guards cheap. */
	struct sigaction sa = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
	sigemptyset(&sa.sa_mask);
	sigaction(SIGBUS, &sa, &before);
}

void scmi_guard_install(void) { pthread_once(&once, install); }

int scmi_media_error(struct guard *g)
{
	scmi_guard_top = g->prev;
	if (scmi_held) { /* the fault has left the allocator half way: what it holds in memory is not to be trusted */
		pthread_mutex_unlock(scmi_held);
		scmi_held = NULL;
		return scmi_fail(g->r, scmi_error(SCM_E_MEDIA, "memory fault at offset %llu: bad block, or the file was cut or has no space behind it",
						  (unsigned long long)g->fault));
	}
	return scmi_error(SCM_E_MEDIA, "region %s: memory fault at offset %llu: bad block, or the file was cut or has no space behind it",
			  g->r->path, (unsigned long long)g->fault);
}

int scmi_guarded(scm_region *r, int (*fn)(void *), void *arg)
{
	struct guard g = {.prev = scmi_guard_top, .r = r};
	if (sigsetjmp(g.env, 0))
		return scmi_media_error(&g);
	scmi_guard_top = &g;
	int rc = fn(arg);
	scmi_guard_top = g.prev;
	return rc;
}

int scm_guard(scm_region *r, int (*fn)(void *), void *arg)
{
	int rc = scmi_broken(r);
	return rc ? rc : scmi_guarded(r, fn, arg);
}

/* All open regions. A child of fork shares the mapping with its parent, and the lock too: it must not change anything. */
static pthread_mutex_t regions_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static scm_region *regions;

static void fork_prepare(void) { pthread_mutex_lock(&regions_lock); }
static void fork_parent(void) { pthread_mutex_unlock(&regions_lock); }

static void fork_child(void)
{
	for (scm_region *r = regions; r; r = r->next) {
		pthread_mutex_init(&r->lock, NULL); /* another thread of the parent may have held it */
		if (r->read_only || r->fd < 0)
			continue; /* private memory, which fork has copied */
		int none = 0;
		if (atomic_compare_exchange_strong(&r->failed, &none, SCM_E_CLOSED))
			strcpy(r->failure, "it belongs to the process that opened it; a child of fork may only read");
	}
	pthread_mutex_init(&regions_lock, NULL);
}

static void fork_watch(void) { pthread_atfork(fork_prepare, fork_parent, fork_child); }

void scmi_regions_add(scm_region *r)
{
	pthread_once(&fork_once, fork_watch);
	pthread_mutex_lock(&regions_lock);
	r->next = regions;
	regions = r;
	pthread_mutex_unlock(&regions_lock);
}

void scmi_regions_remove(scm_region *r)
{
	pthread_mutex_lock(&regions_lock);
	for (scm_region **p = &regions; *p; p = &(*p)->next) {
		if (*p == r) {
			*p = r->next;
			break;
		}
	}
	pthread_mutex_unlock(&regions_lock);
}
