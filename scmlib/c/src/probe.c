/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* What a mapping gives, and whose doing it is: the table "What decides granularity and durability" of docs/scm.md. */
#include "internal.h"

#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef STATX_ATTR_DAX
#define STATX_ATTR_DAX 0x00200000
#endif
#ifndef STATX_MNT_ID
#define STATX_MNT_ID 0x00001000
#endif

struct probe {
	char fstype[32], mount[256], opts[1024], under[64];
	bool dax;
};

static const char *fs_name(long type)
{
	static const struct {
		uint32_t magic;
		const char *name;
	} known[] = {{0x01021994, "tmpfs"}, {0x858458f6, "ramfs"}, {0x958458f6, "hugetlbfs"}, {0x794c7630, "overlay"}, {0xef53, "ext4"},
		{0x58465342, "xfs"}, {0x9123683e, "btrfs"}, {0xf2f52010, "f2fs"}, {0x2fc12fc1, "zfs"}, {0xca451a4e, "bcachefs"},
		{0x65735546, "fuse"}, {0x6969, "nfs"}, {0x01021997, "9p"}};
	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
		if (known[i].magic == (uint32_t)type)
			return known[i].name;
	return NULL;
}

static bool is_memory(const char *fs) { return fs && (!strcmp(fs, "tmpfs") || !strcmp(fs, "ramfs") || !strcmp(fs, "hugetlbfs")); }

/* Spaces and such stand in mountinfo as octal. */
static void unescape(char *s)
{
	char *to = s;
	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
			*to++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 3;
		} else {
			*to++ = *s;
		}
	}
	*to = 0;
}

/* proc(5): id, parent, device, root, mount point, options, optional fields, "-", type, source, super options. */
static void read_mount(struct probe *p, uint64_t id)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;
	while (f && getline(&line, &room, f) > 0) {
		char *save = NULL, *field[11] = {0};
		if (strtoull(line, NULL, 10) != id)
			continue;
		char *tok = strtok_r(line, " \n", &save);
		for (int i = 0; tok && i < 6; i++, tok = strtok_r(NULL, " \n", &save))
			field[i] = tok;
		while (tok && strcmp(tok, "-"))
			tok = strtok_r(NULL, " \n", &save);
		for (int i = 6; i < 9; i++)
			field[i] = strtok_r(NULL, " \n", &save);
		if (!field[5] || !field[7])
			break;
		unescape(field[4]);
		unescape(field[7]);
		snprintf(p->fstype, sizeof(p->fstype), "%s", field[6]);
		snprintf(p->mount, sizeof(p->mount), "%s \"%s\" on \"%s\"", field[6], field[7], field[4]);
		snprintf(p->opts, sizeof(p->opts), ",%s,%s,", field[5], field[8] ? field[8] : "");
		break;
	}
	free(line);
	if (f)
		fclose(f);
}

/* Is a block device memory in disguise: a RAM disk (major 1), zram, or a loop device over a memory filesystem (major 7)? */
static void memory_under(struct probe *p, unsigned major, unsigned minor)
{
	char path[128], link[256], back[512] = "";
	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u", major, minor);
	ssize_t n = readlink(path, link, sizeof(link) - 1);
	link[n > 0 ? n : 0] = 0;
	const char *base = strrchr(link, '/');
	base = base ? base + 1 : link;
	if (major == 1 && !strncmp(base, "ram", 3)) {
		strcpy(p->under, "a RAM disk");
	} else if (!strncmp(base, "zram", 4)) {
		strcpy(p->under, "zram");
	} else if (major == 7) {
		struct statfs s;
		strcat(path, "/loop/backing_file");
		FILE *f = fopen(path, "re");
		bool seen = f && fgets(back, sizeof(back), f);
		if (f)
			fclose(f);
		back[strcspn(back, "\n")] = 0;
		if (!seen || statfs(back, &s))
			strcpy(p->under, "a loop device whose file cannot be seen");
		else if (is_memory(fs_name((long)s.f_type)))
			snprintf(p->under, sizeof(p->under), "a loop device over %s", fs_name((long)s.f_type));
	}
}

static void probe_fd(int fd, const char *path, struct probe *p)
{
	struct statfs sfs;
	struct statx stx;
	memset(p, 0, sizeof(*p));
	snprintf(p->mount, sizeof(p->mount), "the mount that holds %s", path);
	if (!fstatfs(fd, &sfs)) {
		const char *name = fs_name((long)sfs.f_type);
		if (name)
			snprintf(p->fstype, sizeof(p->fstype), "%s", name);
		else
			snprintf(p->fstype, sizeof(p->fstype), "filesystem %#x", (unsigned)sfs.f_type);
	}
	if (!statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_MNT_ID, &stx)) {
		p->dax = stx.stx_attributes & STATX_ATTR_DAX;
		memory_under(p, stx.stx_dev_major, stx.stx_dev_minor);
		if (stx.stx_mask & STATX_MNT_ID)
			read_mount(p, stx.stx_mnt_id);
	}
}

/* Does power loss spare the caches? Every region of persistent memory must say so (Documentation/ABI/testing/sysfs-bus-nvdimm). */
static bool eadr(void)
{
	glob_t g;
	bool all = !glob("/sys/bus/nd/devices/region*", 0, NULL, &g) && g.gl_pathc > 0;
	for (size_t i = 0; all && i < g.gl_pathc; i++) {
		char path[512], text[64] = "";
		snprintf(path, sizeof(path), "%s/persistence_domain", g.gl_pathv[i]);
		FILE *f = fopen(path, "re");
		all = f && fgets(text, sizeof(text), f) && !strncmp(text, "cpu_cache", 9);
		if (f)
			fclose(f);
	}
	globfree(&g);
	return all;
}

static bool has(const struct probe *p, const char *opt) { return strstr(p->opts, opt) != NULL; }

static uint32_t page_durability(const struct probe *p, char *why, size_t room, bool below)
{
	static const char *const disks[] = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs"};
	const char *dax = p->dax ? "the file is DAX, but MAP_SYNC was refused" : "it is not mounted with DAX";
	for (size_t i = 0; i < sizeof(disks) / sizeof(disks[0]); i++) {
		if (strcmp(p->fstype, disks[i]))
			continue;
		if (p->under[0]) {
			snprintf(why, room, "%s; %s lies on %s", dax, p->fstype, p->under);
			return SCM_DURABILITY_PROCESS_CRASH;
		}
		if (has(p, ",nobarrier,") || has(p, ",barrier=0,")) {
			snprintf(why, room, "%s; %s is mounted without barriers", dax, p->fstype);
			return SCM_DURABILITY_PROCESS_CRASH;
		}
		snprintf(why, room, "%s: msync through the page cache of %s", dax, p->fstype);
		return SCM_DURABILITY_POWER_LOSS;
	}
	if (strcmp(p->fstype, "overlay") || below) {
		snprintf(why, room, "nothing is known of what %s does with msync", p->fstype);
		return SCM_DURABILITY_PROCESS_CRASH;
	}
	if (has(p, ",volatile,")) {
		snprintf(why, room, "overlayfs is mounted volatile: it does not sync");
		return SCM_DURABILITY_PROCESS_CRASH;
	}
	/* In a container the upper directory is usually out of sight. */
	char dir[1024] = "";
	const char *at = strstr(p->opts, ",upperdir=");
	if (at)
		snprintf(dir, sizeof(dir), "%.*s", (int)strcspn(at + 10, ","), at + 10);
	int fd = *dir ? open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	struct probe up;
	if (fd >= 0) {
		probe_fd(fd, dir, &up);
		close(fd);
	}
	if (fd < 0 || !strcmp(up.fstype, "overlay")) {
		snprintf(why, room, "overlayfs refuses MAP_SYNC, and what lies under it cannot be seen from here; use a mount of its own for the region");
		return SCM_DURABILITY_PROCESS_CRASH;
	}
	if (is_memory(up.fstype)) {
		snprintf(why, room, "overlayfs refuses MAP_SYNC; its upper directory is on %s", up.fstype);
		return SCM_DURABILITY_PROCESS_CRASH;
	}
	char below_why[256];
	uint32_t d = page_durability(&up, below_why, sizeof(below_why), true);
	snprintf(why, room, "overlayfs refuses MAP_SYNC; its upper directory: %s", below_why);
	return d;
}

/* Decides what may be promised. It is the only place that does. */
void scmi_probe(int fd, const char *path, bool map_sync, uint32_t mode, struct verdict *v)
{
	struct probe p;
	probe_fd(fd, path, &p);
	*v = (struct verdict){.dax = p.dax, .map_sync = map_sync, .eadr = eadr()};
	memcpy(v->fstype, p.fstype, sizeof(v->fstype));
	memcpy(v->mount, p.mount, sizeof(v->mount));
	size_t room = sizeof(v->why);
	if (map_sync) {
		v->gran = v->eadr ? SCM_GRANULARITY_BYTE : SCM_GRANULARITY_CACHE_LINE;
		v->dur = SCM_DURABILITY_POWER_LOSS;
		snprintf(v->why, room, v->eadr ? "MAP_SYNC is accepted, and every persistence domain holds the processor caches" : "MAP_SYNC is accepted");
	} else if (is_memory(p.fstype)) {
		v->gran = SCM_GRANULARITY_CACHE_LINE;
		v->dur = SCM_DURABILITY_PROCESS_CRASH;
		snprintf(v->why, room, "%s is memory of the system: nothing in it survives a crash of the system", p.fstype);
	} else {
		v->gran = SCM_GRANULARITY_PAGE;
		v->dur = page_durability(&p, v->why, room, false);
	}
	size_t n = strlen(v->why);
	if (scmi_best() == INSN_NONE && v->gran == SCM_GRANULARITY_CACHE_LINE) {
		v->gran = SCM_GRANULARITY_PAGE;
		snprintf(v->why + n, room - n, "; this processor has no known instruction to flush a cache line");
	} else if ((mode == SCM_MODE_VOLUME || mode == SCM_MODE_STORAGE) && v->gran < SCM_GRANULARITY_PAGE) {
		v->gran = SCM_GRANULARITY_PAGE;
		snprintf(v->why + n, room - n, "; msync by choice of mode %s", scmi_mode_name(mode));
	}
}

static int choose(const char *var, const char *const names[3], uint32_t *value, bool *forced)
{
	const char *s = getenv(var);
	if (!s || !*s)
		return 0;
	for (uint32_t i = 0; i < 3; i++) {
		if (!strcmp(s, names[i])) {
			*value = i + 1;
			*forced = true;
			return 0;
		}
	}
	return scmi_error(SCM_E_INVALID, "%s=%s: use %s, %s or %s", var, s, names[0], names[1], names[2]);
}

/* SCM_FORCE_GRANULARITY and SCM_FORCE_DURABILITY exist for tests. */
int scmi_verdict_override(struct verdict *v)
{
	static const char *const gran[3] = {"byte", "cacheline", "page"}, *const dur[3] = {"volatile", "process", "power"};
	int rc = choose("SCM_FORCE_GRANULARITY", gran, &v->gran, &v->forced);
	return rc ? rc : choose("SCM_FORCE_DURABILITY", dur, &v->dur, &v->forced);
}

/* Names what is missing and whose fault it is. */
int scmi_verdict_satisfies(const struct verdict *v, const struct scm_options *o)
{
	static const char *const gran[] = {"any", "byte", "cache line", "page"}, *const dur[] = {"any", "volatile", "process crash", "power loss"};
	uint32_t want = o->require_granularity;
	if (o->mode == SCM_MODE_MAPPING && (want == 0 || want > SCM_GRANULARITY_CACHE_LINE))
		want = SCM_GRANULARITY_CACHE_LINE;
	if (want && v->gran > want)
		return scmi_error(SCM_E_GRANULARITY, "persistence is too coarse: %s is required, %s gives %s: %s", gran[want], v->mount, gran[v->gran], v->why);
	if (v->dur < o->require_durability)
		return scmi_error(SCM_E_DURABILITY, "not durable enough: it must survive %s, %s gives %s: %s", dur[o->require_durability], v->mount, dur[v->dur],
				  v->why);
	return 0;
}
