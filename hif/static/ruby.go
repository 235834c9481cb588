// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"strings"
)

// ruby is an installation of Ruby with what a process of it has required.
type ruby struct {
	a     *analysis
	proc  *process
	paths []string
	seen  map[string]bool
	depth int
	gems  bool // the gems' directories are on the path
	specs bool // a gem was used
}

var (
	rbRequire = regexp.MustCompile(`^\s*(?:begin\s+)?(require|require_relative|load|Kernel\.require|autoload)\b\s*\(?\s*(?::\w+\s*,\s*)?['"]([^'"#\n]+)['"]`)
	rbDef     = regexp.MustCompile(`^(\s*)(?:private |protected |public |module_function )?def\s+[^\n]*$`)
	rbOneLine = regexp.MustCompile(`\bend\b\s*(?:#.*)?$|def\s+[\w.?!]+(?:\([^)]*\))?\s*=\s`)
)

// rbRequires gives what a text requires, in order; what is required in methods only if all is set.
func rbRequires(text string, all bool) (found []rbRequired) {
	const most = 5_000
	inside, in := "", false // the indentation of the method that is read
	comment := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "=begin"):
			comment = true
		case strings.HasPrefix(line, "=end"):
			comment = false
		}
		if comment || len(line) > 4096 {
			continue
		}
		if line == "__END__" || len(found) >= most {
			break
		}
		if in && strings.TrimRight(line, " \t") == inside+"end" {
			in = false
			continue
		}
		if !in && !all {
			if m := rbDef.FindStringSubmatch(line); m != nil && !rbOneLine.MatchString(line) {
				inside, in = m[1], true
				continue
			}
		}
		if in {
			continue
		}
		if m := rbRequire.FindStringSubmatch(line); m != nil {
			found = append(found, rbRequired{m[2], m[1] == "require_relative", m[1] == "autoload"})
		}
	}
	return found
}

type rbRequired struct {
	name     string
	relative bool
	auto     bool // when a constant is first used
}

// rbFromC is what extensions require, which no text shows.
var rbFromC = map[string][]string{"socket.so": {"io/wait"}, "date_core.so": {}, "psych.so": {"date"}, "bigdecimal.so": {}}

func (a *analysis) ruby(i invocation) {
	r := a.rubyAt(i)
	if r == nil {
		return
	}
	// Every interpreter loads its tables of encodings, and unless told otherwise rubygems and helpers for errors.
	for _, f := range []string{"enc/encdb.so", "enc/trans/transdb.so"} {
		r.load(f, Startup)
	}
	r.load("rubygems", Startup)
	for _, dir := range r.gemDirs() {
		for _, spec := range a.glob(dir + "/specifications/default/*.gemspec") {
			a.add(spec, Startup)
		}
	}
	for _, f := range []string{"error_highlight", "did_you_mean", "syntax_suggest/core", "monitor", "rubygems/dependency", "rubygems/path_support", "rubygems/util"} {
		r.load(f, Startup)
	}
	a.timeZone()
	args := i.argv[1:]
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		arg := args[0]
		args = args[1:]
		value := func() string {
			if len(arg) > 2 {
				return arg[2:]
			}
			if len(args) == 0 {
				return ""
			}
			v := args[0]
			args = args[1:]
			return v
		}
		switch {
		case strings.HasPrefix(arg, "-r"):
			r.load(value(), Module)
		case strings.HasPrefix(arg, "-I"):
			r.paths = append([]string{value()}, r.paths...)
		case strings.HasPrefix(arg, "-e"):
			r.follow(value(), a.cwd, true)
			return
		case arg == "-S" && len(args) > 0:
			if f := a.lookPath(args[0]); f != "" {
				args[0] = f
			}
		}
	}
	if len(args) == 0 {
		return
	}
	if real, ok := a.add(args[0], Script); ok {
		r.follow(string(a.contents(args[0])), path.Dir("/"+real), true)
	}
	a.arguments(i, args[1:])
}

// rubyAt finds the libraries of an interpreter, in the order of $LOAD_PATH of Debian's and of one built from source.
func (a *analysis) rubyAt(i invocation) *ruby {
	real, _ := a.resolve(i.name)
	if r := a.engines.ruby[real]; r != nil {
		return r
	}
	prefix := path.Dir(path.Dir("/" + real))
	version := strings.TrimPrefix(path.Base(real), "ruby")
	if version == "" {
		for _, dir := range a.glob(prefix + "/lib/ruby/[0-9]*") {
			version = path.Base(dir)
		}
	} else if strings.Count(version, ".") == 1 {
		version += ".0"
	}
	if version == "" {
		return nil
	}
	r := &ruby{a: a, proc: i.proc, seen: map[string]bool{}}
	for _, pattern := range []string{
		prefix + "/local/lib/site_ruby/" + version, prefix + "/local/lib/*/site_ruby", prefix + "/local/lib/site_ruby",
		prefix + "/lib/ruby/site_ruby/" + version, prefix + "/lib/ruby/site_ruby",
		prefix + "/lib/ruby/vendor_ruby/" + version, prefix + "/lib/*/ruby/vendor_ruby/" + version, prefix + "/lib/ruby/vendor_ruby",
		prefix + "/lib/ruby/" + version, prefix + "/lib/*/ruby/" + version, prefix + "/lib/ruby/" + version + "/*-linux*",
	} {
		r.paths = append(r.paths, a.glob(pattern)...)
	}
	r.paths = append(strings.FieldsFunc(a.env["RUBYLIB"], func(c rune) bool { return c == ':' }), r.paths...)
	if a.engines.ruby == nil {
		a.engines.ruby = map[string]*ruby{}
	}
	a.engines.ruby[real] = r
	return r
}

// gemDirs are the directories of gems, installed and of the distribution.
func (r *ruby) gemDirs() []string {
	var dirs []string
	for _, pattern := range []string{
		"/usr/lib/ruby/gems/*", "/usr/local/lib/ruby/gems/*", "/usr/share/rubygems-integration/*", "/var/lib/gems/*", "/usr/lib/*/rubygems-integration/*",
	} {
		dirs = append(dirs, r.a.glob(pattern)...)
	}
	for _, v := range []string{"GEM_HOME", "GEM_PATH", "BUNDLE_PATH"} {
		for _, d := range strings.Split(r.a.env[v], ":") {
			if d != "" && r.a.isDir(d) {
				dirs = append(dirs, d)
			}
		}
	}
	return dirs
}

// load requires a feature. It says if it was found.
func (r *ruby) load(name string, why Reason) bool {
	const deepest, most = 200, 10_000
	if r.seen[name] || r.depth > deepest || len(r.seen) > most || r.a.stopped() {
		return true
	}
	r.seen[name] = true
	for pass := 0; pass < 2; pass++ {
		for _, dir := range r.paths {
			if !r.exists(path.Join(dir, name)) {
				continue
			}
			if strings.Contains(dir, "/gems/") && !r.specs {
				r.specs = true
				for _, gems := range r.gemDirs() {
					for _, spec := range r.a.glob(gems + "/specifications/*.gemspec") {
						r.a.add(spec, Startup)
					}
				}
			}
			return r.file(path.Join(dir, name), why)
		}
		if r.gems || strings.HasSuffix(name, ".so") {
			return false
		}
		// A gem is put on the path when something of it is first required, with the descriptions of all of them read.
		r.gems = true
		before := len(r.paths)
		for _, dir := range r.gemDirs() {
			if libs := r.a.glob(dir + "/gems/*/lib"); len(r.paths)+len(libs) < 2_000 {
				r.paths = append(r.paths, libs...)
			}
		}
		if len(r.paths) == before {
			return false
		}
	}
	return false
}

func (r *ruby) exists(name string) bool {
	if ext := path.Ext(name); ext == ".rb" || ext == ".so" {
		return r.a.isFile(name)
	}
	return r.a.isFile(name+".rb") || r.a.isFile(name+".so")
}

func (r *ruby) file(name string, why Reason) bool {
	for _, ext := range []string{"", ".rb", ".so"} {
		f := name + ext
		if path.Ext(f) != ".rb" && path.Ext(f) != ".so" || !r.a.isFile(f) {
			continue
		}
		if path.Ext(f) == ".so" {
			r.a.dlopen(r.proc, f, why)
			for _, n := range rbFromC[path.Base(f)] {
				r.load(n, Module)
			}
			return true
		}
		real, _ := r.a.add(f, why)
		if !r.seen["/"+real] {
			r.seen["/"+real] = true
			r.depth++
			r.follow(string(r.a.contents(f)), path.Dir("/"+real), false)
			r.depth--
		}
		return true
	}
	return false
}

func (r *ruby) follow(text, dir string, main bool) {
	const deepest = 200
	if r.depth > deepest || !r.a.spend(len(text)) {
		return
	}
	for _, q := range rbRequires(text, main) {
		// Gems split themselves up by autoload and use most of it at once; of the standard library little is used.
		if q.auto && !strings.Contains(dir, "/gems/") {
			continue
		}
		if q.relative || strings.HasPrefix(q.name, "./") {
			r.file(path.Join(dir, q.name), Module)
		} else {
			r.load(q.name, Module)
		}
	}
}
