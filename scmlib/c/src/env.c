/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What the environment says, and the region it names: the paper's scmalloc, scmfree, scmsync. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char *const modes[] = {"auto", "mapping", "volume", "storage", "dram"};

const char *scmi_mode_name(uint32_t mode) { return mode < 5 ? modes[mode] : "unknown"; }

int scmi_mode_parse(const char *s, uint32_t *mode)
{
	*mode = SCM_MODE_AUTO;
	if (!s || !*s)
		return 0;
	for (uint32_t i = 0; i < 5; i++) {
		if (!strcmp(s, modes[i])) {
			*mode = i;
			return 0;
		}
	}
	return scmi_error(SCM_E_NOREGION, "SCM_MODE=%s: use mapping, volume, storage or dram", s);
}

int scmi_size_parse(const char *s, uint64_t *size)
{
	char *end;
	errno = 0;
	uint64_t n = *s >= '0' && *s <= '9' ? strtoull(s, &end, 10) : 0;
	unsigned shift = 0;
	if (n && *end && !end[1]) {
		static const char units[] = "kmgt";
		const char *unit = strchr(units, *end | 0x20);
		if (unit) {
			shift = 10 * (unsigned)(unit - units + 1);
			end++;
		}
	}
	if (!n || errno || *end || n > MAX_SIZE >> shift)
		return scmi_error(SCM_E_SIZE, "SCM_SIZE: wrong size: \"%s\" is not a size", s);
	*size = n << shift;
	return 0;
}

int scmi_env(const char **path, struct scm_options *o)
{
	uint32_t mode;
	int rc = scmi_mode_parse(getenv("SCM_MODE"), &mode);
	if (rc)
		return rc;
	if (o->mode && mode && o->mode != mode)
		return scmi_error(SCM_E_NOREGION, "the program asks for mode %s, SCM_MODE says %s", scmi_mode_name(o->mode), modes[mode]);
	if (mode)
		o->mode = mode;
	const char *s = getenv("SCM_SIZE");
	if (s && *s && !o->size && (rc = scmi_size_parse(s, &o->size)))
		return rc;
	*path = NULL;
	if (o->mode == SCM_MODE_DRAM)
		return 0;
	s = getenv("SCM_REGION");
	if (s && *s) {
		*path = s;
		return 0;
	}
	static const char *const dev = "/dev/scm/region", *const vol = "/scm/region", *const sto = "/var/lib/scm/region";
	const char *first = o->mode == SCM_MODE_STORAGE ? sto : o->mode == SCM_MODE_VOLUME ? vol : dev;
	const char *second = o->mode == SCM_MODE_AUTO || o->mode == SCM_MODE_MAPPING ? vol : NULL;
	if (!access(first, F_OK) || errno != ENOENT)
		*path = first;
	else if (second && (!access(second, F_OK) || errno != ENOENT))
		*path = second;
	if (*path)
		return 0;
	return scmi_error(SCM_E_NOREGION, "no region: SCM_REGION is not set, and there is no %s%s%s: was the container started with a region (--device "
			  "nhybrid.io/scm=...), is the volume mounted, does SCM_MODE name the right place?", first, second ? ", no " : "", second ? second : "");
}

/* The default region ---------------------------------------------------------------------------------------------- */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static scm_region *region;
static int open_error;
static char open_message[768];

static void mark_closed(void)
{
	if (region)
		scm_close(region); /* with transactions running it stays open, and the next open recovers */
	region = NULL;
}

static void open_default(void)
{
	struct scm_options o = {.flags = SCM_OPEN_CREATE};
	uint32_t mode;
	if (!scmi_mode_parse(getenv("SCM_MODE"), &mode) && mode == SCM_MODE_DRAM && !getenv("SCM_SIZE"))
		o.size = 1 << 30; /* taken only as far as it is touched */
	open_error = scm_open(&region, NULL, &o);
	if (open_error)
		strncpy(open_message, scm_errormsg(), sizeof(open_message) - 1);
	else
		atexit(mark_closed);
}

static int to_errno(int code)
{
	switch (code) {
	case SCM_E_FULL: return ENOMEM;
	case SCM_E_NOREGION: return ENOENT;
	case SCM_E_LOCKED: case SCM_E_BUSY: return EBUSY;
	case SCM_E_MEDIA: case SCM_E_CORRUPT: case SCM_E_UNSAFE: case SCM_E_SYSTEM: case SCM_E_CLOSED: return EIO;
	case SCM_E_READONLY: return EROFS;
	default: return EINVAL;
	}
}

scm_region *scm_default(void)
{
	pthread_once(&once, open_default);
	if (!region) {
		scmi_error(open_error ? open_error : SCM_E_CLOSED, "%s", open_error ? open_message : "the default region is closed");
		errno = to_errno(open_error);
	}
	return region;
}

void *scmalloc(size_t n)
{
	scm_region *r = scm_default();
	scm_tx *t;
	void *p = NULL;
	if (!r)
		return NULL;
	int rc = scm_tx_begin(r, &t);
	if (!rc && (rc = scm_tx_alloc(t, n, &p)))
		scm_tx_abort(t);
	else if (!rc)
		rc = scm_tx_commit(t);
	if (rc)
		errno = to_errno(rc);
	return rc ? NULL : p;
}

void scmfree(void *addr)
{
	scm_region *r = addr ? scm_default() : NULL;
	scm_tx *t;
	if (!r)
		return;
	int rc = scm_tx_begin(r, &t);
	if (!rc && (rc = scm_tx_free(t, addr))) {
		/* As free(3): to go on would hand out memory twice sooner or later. */
		fprintf(stderr, "scmfree(%p): %s\n", addr, scm_errormsg());
		abort();
	}
	if (!rc)
		rc = scm_tx_commit(t);
	if (rc)
		errno = to_errno(rc);
}

int scmsync(const void *addr, size_t n)
{
	scm_region *r = scm_default();
	int rc = r ? scm_persist(r, addr, n) : SCM_E_CLOSED;
	if (r && rc)
		errno = to_errno(rc);
	return rc ? -1 : 0;
}

void *scmroot(size_t n)
{
	scm_region *r = scm_default();
	void *p = NULL;
	int rc = r ? scm_root(r, n, 0, &p) : 0;
	if (rc)
		errno = to_errno(rc);
	return p;
}
