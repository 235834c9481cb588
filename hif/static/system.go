// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"bytes"
	"io"
	"io/fs"
	"path"
	"strings"
)

// zone are functions of the C library that read the time zone.
var zone = []string{"localtime", "localtime_r", "tzset", "mktime"}

// system predicts what the C library opens for a program, by the functions that the program imports. That a function is
// imported does not say that a start calls it; of those here it nearly always does.
func (a *analysis) system(o *object) {
	if o.hasAny(zone...) {
		a.timeZone()
	}
	if o.has("setlocale") && a.localeName() != "" {
		a.locale(o, a.localeName(), localeCategories)
	}
}

func (a *analysis) timeZone() {
	name := strings.TrimPrefix(a.env["TZ"], ":")
	switch {
	case name == "":
		a.add("/etc/localtime", System)
	case strings.HasPrefix(name, "/"):
		a.add(name, System)
	default:
		a.add("/usr/share/zoneinfo/"+name, System)
	}
}

// localeName is the locale that the environment asks for, "" for that of POSIX.
func (a *analysis) localeName() string {
	for _, v := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if l := a.env[v]; l != "" {
			if l == "C" || l == "POSIX" || strings.ContainsAny(l, "/\x00") {
				return ""
			}
			return l
		}
	}
	return ""
}

var localeCategories = []string{
	"LC_IDENTIFICATION", "LC_MEASUREMENT", "LC_TELEPHONE", "LC_ADDRESS", "LC_NAME", "LC_PAPER", "LC_MESSAGES/SYS_LC_MESSAGES",
	"LC_MONETARY", "LC_COLLATE", "LC_TIME", "LC_NUMERIC", "LC_CTYPE",
}

// locale predicts what glibc opens for a locale (locale/findlocale.c): the archive, else a directory of its own, whose
// name has the character set in small letters without signs. musl has no such files.
func (a *analysis) locale(o *object, name string, categories []string) {
	if o == nil || strings.Contains(o.interp, "ld-musl") {
		return
	}
	const dir = "/usr/lib/locale"
	if _, ok := a.add(path.Join(dir, "locale-archive"), System); !ok || strings.HasPrefix(name, "C.") {
		base, charset, _ := strings.Cut(name, ".")
		norm := strings.ToLower(strings.ReplaceAll(charset, "-", ""))
		for _, d := range []string{name, base + "." + norm, base} {
			if !a.isDir(path.Join(dir, d)) {
				continue
			}
			for _, c := range categories {
				a.add(path.Join(dir, d, c), System)
			}
			break
		}
	}
	if len(categories) > 1 {
		a.add("/usr/share/locale/locale.alias", System)
	}
	for _, lib := range defaultDirs(o) {
		if _, ok := a.add(path.Join(lib, "gconv/gconv-modules.cache"), System); ok {
			break
		}
	}
}

// named are programs that look up users or groups whenever they run.
var named = map[string]string{
	"chown": "ug", "chgrp": "g", "id": "ug", "su": "ug", "runuser": "ug", "setpriv": "ug", "gosu": "ug", "su-exec": "ug", "sudo": "ug", "install": "ug",
	"nginx": "ug", "apache2": "ug", "httpd": "ug", "mysqld": "ug", "mariadbd": "ug", "postgres": "u", "initdb": "u", "java": "u", "whoami": "u",
	"php-fpm": "ug", "memcached": "u", "haproxy": "ug", "ls": "ug", "bash": "u",
}

// users predicts what a program that looks up users opens.
func (a *analysis) users(program string) {
	for _, what := range named[program] {
		a.add("/etc/nsswitch.conf", System)
		// "compat" and NIS are separate libraries; "files" and "dns" are in libc since glibc 2.34.
		if what == 'u' {
			a.nameService("passwd")
			a.add("/etc/passwd", System)
		} else {
			a.nameService("group")
			a.add("/etc/group", System)
		}
	}
}

// nameService predicts the libraries of services that /etc/nsswitch.conf names for a database.
func (a *analysis) nameService(database string) {
	for line := range strings.Lines(string(a.head("/etc/nsswitch.conf", 64<<10))) {
		services, ok := strings.CutPrefix(strings.TrimSpace(line), database+":")
		if !ok {
			continue
		}
		for _, s := range strings.Fields(services) {
			if strings.HasPrefix(s, "[") || strings.ContainsAny(s, "/#") {
				continue
			}
			for _, f := range a.elf.cacheLookup("libnss_" + s + ".so.2") {
				// What is within libc is not opened; the stubs that are left for old programs have a few KiB.
				const stub = 20 << 10
				if real, n := a.resolve(f); n.ok && n.size > stub {
					a.add("/"+real, Library)
				}
			}
		}
	}
}

func (e *elfState) cacheLookup(name string) []string {
	var found []string
	for _, c := range e.cache[name] {
		found = append(found, c.path)
	}
	return found
}

// paths are files that programs without a C library, such as those of Go, read by themselves.
var paths = []string{
	"/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem", "/etc/services", "/etc/protocols",
}

// mentioned predicts those of the well-known files that a static program names and the image has: nothing else can be
// known of what it opens.
func (a *analysis) mentioned(name string) {
	var there []string
	for _, p := range paths {
		if a.isFile(p) {
			there = append(there, p)
		}
	}
	if len(there) == 0 {
		return
	}
	const most, step, overlap = 64 << 20, 1 << 20, 64
	a.open(name, func(f fs.File, size int64) {
		buffer := make([]byte, step+overlap)
		kept := 0
		for total := int64(0); total < min(size, most) && len(there) > 0 && !a.stopped(); {
			n, err := io.ReadFull(f, buffer[kept:])
			total += int64(n)
			a.count(int64(n))
			window := buffer[:kept+n]
			left := there[:0:0]
			for _, p := range there {
				if bytes.Contains(window, []byte(p)) {
					a.add(p, System)
				} else {
					left = append(left, p)
				}
			}
			there = left
			if err != nil {
				return
			}
			kept = copy(buffer, window[len(window)-overlap:])
		}
	})
}
