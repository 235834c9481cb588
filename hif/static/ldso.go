// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"debug/elf"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// elfState is what is kept of ELF files and the image's dynamic linker.
type elfState struct {
	objects  map[string]*object // by path; nil: no ELF file
	cache    map[string][]cacheEntry
	cached   bool // the cache was read
	confDirs []string
}

// loaded is an object in a process, with what its own libraries are searched by.
type loaded struct {
	*object
	path   string
	parent *loaded
}

// process is a program or engine with what its dynamic linker has loaded.
type process struct {
	names map[string]bool // as searched for, and sonames
	main  *loaded
	musl  bool
}

// object parses an ELF file, once. nil: it is none.
func (a *analysis) object(name string) *object {
	if a.elf.objects == nil {
		a.elf.objects = map[string]*object{}
	}
	real, _ := a.resolve(name)
	if o, ok := a.elf.objects[real]; ok {
		return o
	}
	var o *object
	a.open(name, func(f fs.File, size int64) {
		o, _ = parseELF(a.readAt(f, size)) // no ELF file: nil
	})
	a.elf.objects[real] = o
	return o
}

// start predicts what the kernel and the dynamic linker open to start a program. nil: nothing is linked dynamically.
func (a *analysis) start(name string) *process {
	real, _ := a.resolve(name)
	o := a.object(name)
	if o == nil || o.interp == "" {
		return nil
	}
	p := &process{names: map[string]bool{}, musl: strings.Contains(path.Base(o.interp), "ld-musl")}
	p.main = &loaded{object: o, path: "/" + real}
	a.add(o.interp, Loader)
	p.names[path.Base(o.interp)] = true
	if l := a.object(o.interp); l != nil && l.soname != "" {
		p.names[l.soname] = true
	}
	if !p.musl {
		for _, name := range strings.Fields(string(a.head("/etc/ld.so.preload", 4096))) {
			a.load(p, p.main, name)
		}
		if len(o.needed) > 0 {
			a.add("/etc/ld.so.preload", Loader)
		}
	}
	for _, name := range strings.FieldsFunc(a.env["LD_PRELOAD"], func(r rune) bool { return r == ' ' || r == ':' }) {
		a.load(p, p.main, name)
	}
	a.closure(p, p.main)
	a.system(o)
	if p.names["libcrypto.so.3"] || p.names["libcrypto.so.1.1"] {
		// OpenSSL reads its configuration when it is first used.
		for _, f := range []string{"/usr/lib/ssl/openssl.cnf", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf"} {
			a.add(f, System)
		}
	}
	return p
}

// closure loads what an object needs, breadth first as ld.so does.
func (a *analysis) closure(p *process, first *loaded) {
	queue := []*loaded{first}
	for len(queue) > 0 && !a.stopped() {
		o := queue[0]
		queue = queue[1:]
		for _, name := range o.needed {
			if l := a.load(p, o, name); l != nil {
				queue = append(queue, l)
			}
		}
	}
}

// dlopen loads a library into a process, as engines do with their modules.
func (a *analysis) dlopen(p *process, name string, why Reason) bool {
	if p == nil || a.stopped() {
		return false
	}
	if !strings.Contains(name, "/") {
		l := a.load(p, p.main, name)
		if l != nil {
			a.closure(p, l)
		}
		return l != nil
	}
	real, ok := a.add(name, why)
	o := a.object(name)
	if !ok || o == nil {
		return false
	}
	if !p.names["/"+real] {
		p.names["/"+real] = true
		a.closure(p, &loaded{object: o, path: "/" + real, parent: p.main})
	}
	return true
}

// load finds one library. nil: it is loaded already, or is not there.
func (a *analysis) load(p *process, by *loaded, name string) *loaded {
	if p.names[name] {
		return nil
	}
	p.names[name] = true
	if p.musl && muslOwn(name) {
		return nil
	}
	found := a.findLibrary(p, by, name)
	if found == "" {
		return nil
	}
	real, ok := a.add(found, Library)
	o := a.object(found)
	if !ok || o == nil || p.names["/"+real] {
		return nil
	}
	p.names["/"+real] = true
	if o.soname != "" {
		p.names[o.soname] = true
	}
	return &loaded{object: o, path: "/" + real, parent: by}
}

// muslOwn are the names that musl's loader answers itself (ldso/dynlink.c, load_library).
func muslOwn(name string) bool {
	base, _, _ := strings.Cut(name, ".")
	return slices.Contains([]string{"libc", "libpthread", "librt", "libm", "libdl", "libutil", "libxnet"}, base)
}

// findLibrary searches in the order of ld.so(8), or of musl, where paths are inherited and there is no cache.
func (a *analysis) findLibrary(p *process, by *loaded, name string) string {
	if strings.Contains(name, "/") {
		return a.fits(p, a.origin(name, by))
	}
	if !p.musl && by.runpath == "" {
		for o := by; o != nil; o = o.parent {
			if f := a.searchPath(p, o.rpath, o, name); f != "" {
				return f
			}
		}
		if f := a.searchPath(p, p.main.rpath, p.main, name); f != "" {
			return f
		}
	}
	if f := a.searchPath(p, a.env["LD_LIBRARY_PATH"], p.main, name); f != "" {
		return f
	}
	if p.musl {
		for o := by; o != nil; o = o.parent {
			if f := a.searchPath(p, o.runpath+":"+o.rpath, o, name); f != "" {
				return f
			}
		}
		return a.searchDirs(p, a.muslDirs(p), name)
	}
	if f := a.searchPath(p, by.runpath, by, name); f != "" {
		return f
	}
	if f := a.searchCache(p, name); f != "" {
		return f
	}
	return a.searchDirs(p, append(defaultDirs(p.main.object), a.ldConfDirs()...), name)
}

// origin replaces the names that the dynamic linker knows (ld.so(8), "Dynamic string tokens").
func (a *analysis) origin(dir string, by *loaded) string {
	if !strings.Contains(dir, "$") {
		return dir
	}
	lib := "lib"
	if by.class == elf.ELFCLASS64 {
		lib = "lib64"
	}
	at := path.Dir(by.path)
	return strings.NewReplacer("$ORIGIN", at, "${ORIGIN}", at, "$LIB", lib, "${LIB}", lib).Replace(dir)
}

func (a *analysis) searchPath(p *process, list string, by *loaded, name string) string {
	const maxDirs = 256
	if list == "" {
		return ""
	}
	var dirs []string
	for i, dir := range strings.FieldsFunc(list, func(r rune) bool { return r == ':' || r == ';' }) {
		if i == maxDirs {
			break
		}
		dirs = append(dirs, a.origin(dir, by))
	}
	return a.searchDirs(p, dirs, name)
}

// searchDirs looks into each directory, for glibc first into the subdirectories for better processors.
func (a *analysis) searchDirs(p *process, dirs []string, name string) string {
	for _, dir := range dirs {
		if !p.musl && a.isDir(dir+"/glibc-hwcaps") {
			for _, level := range a.options.HWCaps {
				if f := a.fits(p, path.Join(dir, "glibc-hwcaps", level, name)); f != "" {
					return f
				}
			}
		}
		if f := a.fits(p, path.Join(dir, name)); f != "" {
			return f
		}
	}
	return ""
}

func (a *analysis) searchCache(p *process, name string) string {
	if !a.elf.cached {
		a.elf.cached = true
		a.elf.cache = parseLDCache(a.contents("/etc/ld.so.cache"))
	}
	a.add("/etc/ld.so.cache", Loader)
	entries := a.elf.cache[name]
	for _, level := range append(slices.Clone(a.options.HWCaps), "") {
		for _, e := range entries {
			if e.hwcap == level {
				if f := a.fits(p, e.path); f != "" {
					return f
				}
			}
		}
	}
	return ""
}

// fits says if a file is a library for the process: the dynamic linker passes over those of other architectures.
func (a *analysis) fits(p *process, name string) string {
	if !a.isFile(name) {
		return ""
	}
	o := a.object(name)
	if o == nil || o.class != p.main.class || o.machine != p.main.machine {
		return ""
	}
	return name
}

// defaultDirs are the directories that dynamic linkers have built in: of Debian's multiarch, and of the others.
func defaultDirs(o *object) []string {
	tuple := map[elf.Machine]string{
		elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu", elf.EM_386: "i386-linux-gnu",
		elf.EM_ARM: "arm-linux-gnueabihf", elf.EM_RISCV: "riscv64-linux-gnu", elf.EM_S390: "s390x-linux-gnu",
		elf.EM_PPC64: "powerpc64le-linux-gnu",
	}[o.machine]
	var dirs []string
	if tuple != "" {
		dirs = append(dirs, "/lib/"+tuple, "/usr/lib/"+tuple)
	}
	if o.class == elf.ELFCLASS64 {
		dirs = append(dirs, "/lib64", "/usr/lib64")
	}
	return append(dirs, "/lib", "/usr/lib")
}

// ldConfDirs are the directories of /etc/ld.so.conf. ld.so itself does not read it, but runtimes' hooks run ldconfig at a
// start (those for GPUs do), and in images without a cache it says where libraries are.
func (a *analysis) ldConfDirs() []string {
	if a.elf.confDirs == nil {
		a.elf.confDirs = []string{}
		a.ldConf("/etc/ld.so.conf", 0)
	}
	return a.elf.confDirs
}

func (a *analysis) ldConf(name string, depth int) {
	const maxDepth, maxDirs = 4, 256
	if depth > maxDepth {
		return
	}
	for line := range strings.Lines(string(a.head(name, 64<<10))) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0 || len(a.elf.confDirs) >= maxDirs:
		case fields[0] == "include":
			for _, pattern := range fields[1:] {
				if !strings.HasPrefix(pattern, "/") {
					pattern = path.Join(path.Dir(name), pattern)
				}
				for _, f := range a.glob(pattern) {
					a.ldConf(f, depth+1)
				}
			}
		case strings.HasPrefix(fields[0], "/"):
			a.elf.confDirs = append(a.elf.confDirs, fields[0])
		}
	}
}

// muslDirs are the directories of musl's own file, or what is built in.
func (a *analysis) muslDirs(p *process) []string {
	arch := strings.TrimSuffix(strings.TrimPrefix(path.Base(p.main.interp), "ld-musl-"), ".so.1")
	conf := "/etc/ld-musl-" + arch + ".path"
	if a.isFile(conf) {
		a.add(conf, Loader)
		return strings.FieldsFunc(string(a.head(conf, 64<<10)), func(r rune) bool { return r == ':' || r == '\n' })
	}
	return []string{"/lib", "/usr/local/lib", "/usr/lib"}
}
