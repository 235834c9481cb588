// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"io"
	"io/fs"
	"path"
	"strings"
)

func (a *analysis) java(i invocation) {
	real, _ := a.resolve(i.name)
	home := path.Dir(path.Dir("/" + real))
	args := append(append(strings.Fields(a.env["JDK_JAVA_OPTIONS"]), strings.Fields(a.env["JAVA_TOOL_OPTIONS"])...), i.argv[1:]...)
	args = a.javaArgFiles(args)
	app, jars := javaArguments(args, a.env["CLASSPATH"])
	if a.isFile(home+"/lib/modules") || a.isFile(home+"/lib/jvm.cfg") {
		a.javaModular(i.proc, home, app)
	} else {
		a.java8(i.proc, home, app)
	}
	a.timeZone() // libjvm asks for it
	for _, jar := range jars {
		a.jar(jar, 0)
	}
	a.arguments(i, args)
}

// javaModular is the start-up set of Java 9 and later.
func (a *analysis) javaModular(p *process, home string, app bool) {
	lib := home + "/lib"
	a.add(lib+"/jvm.cfg", Startup)
	for _, kind := range []string{"server", "client", "minimal"} {
		if a.dlopen(p, path.Join(lib, kind, "libjvm.so"), Startup) {
			a.add(path.Join(lib, kind, "classes.jsa"), Startup)
			break
		}
	}
	for _, f := range []string{"libjimage.so", "libjava.so", "libjsvml.so"} {
		a.dlopen(p, lib+"/"+f, Startup)
	}
	a.add(lib+"/modules", Startup)
	if !app {
		return
	}
	for _, f := range []string{"libzip.so", "libnio.so", "libnet.so"} {
		a.dlopen(p, lib+"/"+f, Startup)
	}
	a.add(home+"/conf/security/java.security", Startup)
	a.add(lib+"/tzdb.dat", Startup)
}

// java8 is the start-up set of Java 8 and earlier, with its jars.
func (a *analysis) java8(p *process, home string, app bool) {
	if a.isDir(home + "/jre/lib") {
		home += "/jre"
	}
	lib := home + "/lib"
	arch := ""
	for _, d := range []string{"amd64", "aarch64", "i386", "arm", "ppc64le", "s390x"} {
		if a.isDir(lib + "/" + d) {
			arch = lib + "/" + d
		}
	}
	if arch == "" {
		return
	}
	a.add(arch+"/jvm.cfg", Startup)
	a.dlopen(p, arch+"/server/libjvm.so", Startup)
	for _, f := range []string{"libverify.so", "libjava.so", "libzip.so"} {
		a.dlopen(p, arch+"/"+f, Startup)
	}
	a.add(lib+"/meta-index", Startup)
	a.add(lib+"/rt.jar", Startup)
	if !app {
		return
	}
	for _, f := range []string{"libnio.so", "libnet.so"} {
		a.dlopen(p, arch+"/"+f, Startup)
	}
	for _, f := range []string{"security/java.security", "resources.jar", "jsse.jar", "jce.jar", "charsets.jar", "tzdb.dat", "ext/meta-index"} {
		a.add(lib+"/"+f, Startup)
	}
}

// javaArgFiles puts the contents of @FILE in place.
func (a *analysis) javaArgFiles(args []string) []string {
	const most = 4096
	var out []string
	for _, arg := range args {
		if name, ok := strings.CutPrefix(arg, "@"); ok && a.isFile(name) {
			a.add(name, Argument)
			out = append(out, strings.Fields(string(a.head(name, 64<<10)))...)
		} else {
			out = append(out, arg)
		}
		if len(out) > most {
			return out[:most]
		}
	}
	return out
}

// javaArguments finds the jars on a command line. app: something runs, not only "-version".
func javaArguments(args []string, classPath string) (app bool, jars []string) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		next := func() string {
			if len(args) == 0 {
				return ""
			}
			v := args[0]
			args = args[1:]
			return v
		}
		switch {
		case arg == "-cp" || arg == "-classpath" || arg == "--class-path" || arg == "-p" || arg == "--module-path":
			classPath = next()
		case arg == "-jar":
			return true, append(jars, next())
		case strings.HasPrefix(arg, "-javaagent:"):
			agent, _, _ := strings.Cut(strings.TrimPrefix(arg, "-javaagent:"), "=")
			jars = append(jars, agent)
		case strings.HasPrefix(arg, "-Xbootclasspath/a:"):
			jars = append(jars, strings.Split(strings.TrimPrefix(arg, "-Xbootclasspath/a:"), ":")...)
		case arg == "-m" || arg == "--module" || arg == "--add-modules" || arg == "--add-opens" || arg == "--add-exports" || arg == "--add-reads":
			app = app || arg == "-m" || arg == "--module"
			next()
		case arg == "" || strings.HasPrefix(arg, "-"):
		default:
			return true, append(jars, strings.Split(classPath, ":")...)
		}
	}
	return app, append(jars, strings.Split(classPath, ":")...)
}

// jar predicts an entry of a class path: a jar with those of its manifest, a directory's jars ("lib/*"), or a directory
// of classes, of which nothing can be told.
func (a *analysis) jar(name string, depth int) {
	const deepest = 8
	if name == "" || depth > deepest || a.stopped() {
		return
	}
	if dir, ok := strings.CutSuffix(name, "/*"); ok {
		for _, f := range a.glob(dir + "/*.jar") {
			a.jar(f, depth+1)
		}
		return
	}
	before := len(a.files)
	real, ok := a.add(name, Module)
	if !ok || len(a.files) == before {
		return
	}
	a.open("/"+real, func(f fs.File, size int64) {
		for _, entry := range jarClassPath(a.readAt(f, size), size) {
			if !strings.HasPrefix(entry, "/") {
				// Relative to the jar as it was named, not to what a link leads to.
				entry = path.Join(path.Dir(name), entry)
			}
			a.jar(entry, depth+1)
		}
	})
}

// jarClassPath reads Class-Path of a jar's manifest.
func jarClassPath(r io.ReaderAt, size int64) []string {
	const maxDirectory, maxEntries, maxManifest = 32 << 20, 200_000, 1 << 20
	// The end of the central directory, in the last 64 KiB: what package zip would allocate for is known from there.
	tail := make([]byte, min(size, 64<<10+22))
	if _, err := r.ReadAt(tail, size-int64(len(tail))); err != nil && err != io.EOF {
		return nil
	}
	end := bytes.LastIndex(tail, []byte("PK\x05\x06"))
	if end < 0 || len(tail)-end < 22 {
		return nil
	}
	entries, directory := binary.LittleEndian.Uint16(tail[end+10:]), binary.LittleEndian.Uint32(tail[end+12:])
	if entries == 0xffff || int64(directory) > min(size, maxDirectory) || int(entries) > maxEntries {
		return nil // ZIP64: no jar of an application has 65 535 classes and a class path
	}
	z, err := zip.NewReader(r, size)
	if err != nil {
		return nil
	}
	for _, f := range z.File {
		if !strings.EqualFold(f.Name, "META-INF/MANIFEST.MF") {
			continue
		}
		m, err := f.Open()
		if err != nil {
			return nil
		}
		defer m.Close()
		text, err := io.ReadAll(io.LimitReader(m, maxManifest))
		if err != nil {
			return nil
		}
		return manifestClassPath(text)
	}
	return nil
}

func manifestClassPath(text []byte) []string {
	s := strings.ReplaceAll(string(text), "\r\n", "\n")
	s = strings.ReplaceAll(s, "\n ", "") // lines go on after a space
	for line := range strings.Lines(s) {
		if v, ok := strings.CutPrefix(line, "Class-Path:"); ok {
			const most = 2_000
			entries := strings.Fields(v)
			return entries[:min(len(entries), most)]
		}
	}
	return nil
}
