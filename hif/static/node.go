// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"encoding/json"
	"path"
	"regexp"
	"slices"
	"strings"
)

var (
	jsRequire = regexp.MustCompile(`\brequire\(\s*['"]([^'"\n]{1,256})['"]\s*\)|\bimport\s*\(?\s*['"]([^'"\n]{1,256})['"]|\bfrom\s*['"]([^'"\n]{1,256})['"]`)
	// jsCall is what stands before the brace of a block that is no function.
	jsBlock = regexp.MustCompile(`\b(?:if|for|while|switch|catch|with)\s*$`)
	jsIIFE  = regexp.MustCompile(`(?:^|[(!;])\s*(?:async\s+)?function\s*[\w$]*\s*$`)
)

// jsRequires gives the modules that a text names. Those of elsewhere in functions are left out unless all is set: most
// functions of modules are not called at a start. A function that is called where it stands, as around whole modules, is none.
func jsRequires(text string, all bool) []string {
	const most = 5_000
	plain, edges := jsPlain(text)
	var found []string
	for _, m := range jsRequire.FindAllStringSubmatchIndex(plain, most) {
		// Files beside and below are mostly loaded even when by a function.
		at, _ := slices.BinarySearch(edges, m[0]+1)
		inside := at%2 == 1
		for g := 2; g < len(m); g += 2 {
			if m[g] >= 0 && (all || !inside || strings.HasPrefix(plain[m[g]:m[g+1]], "./")) {
				found = append(found, plain[m[g]:m[g+1]])
			}
		}
	}
	return found
}

// jsPlain removes comments, and says where in the rest functions begin, end, begin, …
func jsPlain(text string) (plain string, edges []int) {
	var b strings.Builder
	var quote byte
	var braces []bool // of open braces: is it a function's
	functions := 0
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case quote != 0:
			if c == '\\' && i+1 < len(text) {
				b.WriteByte(c)
				i++
				c = text[i]
			} else if c == quote || c == '\n' && quote != '`' {
				quote = 0 // a quote that was one of a regular expression ends with its line
			}
		case c == '/' && strings.HasPrefix(text[i:], "//"):
			if n := strings.IndexByte(text[i:], '\n'); n >= 0 {
				i += n - 1
			} else {
				i = len(text)
			}
			continue
		case c == '/' && strings.HasPrefix(text[i:], "/*"):
			if n := strings.Index(text[i+2:], "*/"); n >= 0 {
				i += n + 3
			} else {
				i = len(text)
			}
			continue
		case c == '"' || c == '\'' || c == '`':
			quote = c
		case c == '{':
			is := jsOpensFunction(b.String())
			if len(braces) < 10_000 {
				braces = append(braces, is)
				if is {
					if functions == 0 {
						edges = append(edges, b.Len())
					}
					functions++
				}
			}
		case c == '}' && len(braces) > 0:
			if braces[len(braces)-1] {
				if functions--; functions == 0 {
					edges = append(edges, b.Len())
				}
			}
			braces = braces[:len(braces)-1]
		}
		b.WriteByte(c)
	}
	return b.String(), edges
}

// jsOpensFunction says if a brace after the text opens a function that is not called at once.
func jsOpensFunction(before string) bool {
	const window = 400
	before = before[max(0, len(before)-window):]
	before = strings.TrimRight(before, " \t\r\n")
	if strings.HasSuffix(before, "=>") {
		return true
	}
	if !strings.HasSuffix(before, ")") {
		return false
	}
	depth := 0
	for i := len(before) - 1; i >= 0; i-- {
		switch before[i] {
		case ')':
			depth++
		case '(':
			if depth--; depth == 0 {
				head := before[:i]
				return !jsBlock.MatchString(head) && !jsIIFE.MatchString(head)
			}
		}
	}
	return true
}

// nodeDebian are the modules that Debian's Node takes from files where others have them built in.
var nodeDebian = []string{
	"cjs-module-lexer/lexer.js", "cjs-module-lexer/dist/lexer.js", "acorn/dist/acorn.js", "acorn-walk/dist/walk.js", "undici/undici-fetch.js",
}

// nodePaths are searched after node_modules: what Debian builds in.
var nodePaths = []string{"/usr/lib/x86_64-linux-gnu/nodejs", "/usr/lib/aarch64-linux-gnu/nodejs", "/usr/lib/nodejs", "/usr/share/nodejs"}

func (a *analysis) node(i invocation) {
	if a.engines.node == nil {
		a.engines.node = map[string]bool{}
	}
	if i.proc != nil {
		for _, n := range i.proc.main.needed {
			if strings.HasPrefix(n, "libnode") {
				for _, f := range nodeDebian {
					a.add("/usr/share/nodejs/"+f, Startup)
				}
			}
		}
	}
	a.timeZone() // V8 asks for it
	args := i.argv[1:]
	for _, option := range strings.Fields(a.env["NODE_OPTIONS"]) {
		args = append([]string{option}, args...)
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		arg := args[0]
		args = args[1:]
		name, value, has := strings.Cut(arg, "=")
		switch name {
		case "-r", "--require", "--import", "--loader":
			if !has && len(args) > 0 {
				value, args = args[0], args[1:]
			}
			a.nodeFollow(i.proc, a.nodeResolve(a.cwd, value), false, 0)
		case "-e", "--eval", "-p", "--print":
			if !has && len(args) > 0 {
				value = args[0]
			}
			for _, r := range jsRequires(value, true) {
				a.nodeFollow(i.proc, a.nodeResolve(a.cwd, r), false, 0)
			}
			return
		}
	}
	if len(args) == 0 {
		return
	}
	main := args[0]
	if !strings.HasPrefix(main, "/") {
		main = "./" + main
	}
	a.nodeFollow(i.proc, a.nodeResolve(a.cwd, main), true, 0)
	a.arguments(i, args[1:])
}

// nodeFollow predicts a module and what it requires.
func (a *analysis) nodeFollow(proc *process, name string, main bool, depth int) {
	const deepest, most = 300, 20_000
	real, ok := a.add(name, Module)
	if !ok || a.engines.node[real] || depth > deepest || len(a.engines.node) > most || a.stopped() {
		return
	}
	a.engines.node[real] = true
	a.nodeScope(path.Dir("/" + real))
	switch path.Ext(real) {
	case ".json":
		return
	case ".node":
		a.dlopen(proc, name, Module)
		return
	}
	text := string(a.contents(name))
	if !a.spend(len(text)) {
		return
	}
	for _, r := range jsRequires(text, main) {
		if base := strings.TrimSuffix(path.Base(r), ".js"); strings.HasSuffix(base, "browser") || strings.HasPrefix(r, "node:") {
			continue // what browsers load instead, and what is built in
		}
		a.nodeFollow(proc, a.nodeResolve(path.Dir("/"+real), r), false, depth+1)
	}
}

// nodeScope predicts the package.json that tells what kind of module a file is: the nearest above.
func (a *analysis) nodeScope(dir string) {
	for ; ; dir = path.Dir(dir) {
		if _, ok := a.add(dir+"/package.json", Module); ok || dir == "/" || path.Base(dir) == "node_modules" {
			return
		}
	}
}

// nodeResolve finds a module as require does. "": built in, or not there.
func (a *analysis) nodeResolve(dir, name string) string {
	if strings.HasPrefix(name, "/") || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") || name == "." || name == ".." {
		if !strings.HasPrefix(name, "/") {
			name = path.Join(dir, name)
		}
		return a.nodeFile(name)
	}
	if nodeBuiltin[name] {
		return ""
	}
	var dirs []string
	for d := dir; ; d = path.Dir(d) {
		if path.Base(d) != "node_modules" {
			dirs = append(dirs, path.Join(d, "node_modules"))
		}
		if d == "/" || len(dirs) > 64 {
			break
		}
	}
	dirs = append(dirs, strings.Split(a.env["NODE_PATH"], ":")...)
	for _, d := range append(dirs, nodePaths...) {
		if d == "" || !a.isDir(d) {
			continue
		}
		if f := a.nodePackage(d, name); f != "" {
			return f
		}
	}
	return ""
}

// nodePackage finds "package", "@scope/package" or "package/file" in a directory of packages.
func (a *analysis) nodePackage(dir, name string) string {
	parts := strings.SplitN(name, "/", 3)
	n := 1
	if strings.HasPrefix(name, "@") {
		n = 2
	}
	pkg, sub := strings.Join(parts[:min(n, len(parts))], "/"), strings.Join(parts[min(n, len(parts)):], "/")
	at := path.Join(dir, pkg)
	if a.isDir(at) {
		var p struct {
			Exports json.RawMessage `json:"exports"`
		}
		if a.isFile(at+"/package.json") && json.Unmarshal(a.head(at+"/package.json", 1<<20), &p) == nil && len(p.Exports) > 0 {
			a.add(at+"/package.json", Module)
			if f := nodeExport(p.Exports, "./"+sub, 0); f != "" && a.isFile(path.Join(at, f)) {
				return path.Join(at, f)
			}
		}
	}
	return a.nodeFile(path.Join(dir, name))
}

// nodeExport reads the field exports of a package.json for a require from Node.
func nodeExport(raw json.RawMessage, key string, depth int) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	var list []json.RawMessage
	var m map[string]json.RawMessage
	const deepest = 8
	if depth > deepest {
		return ""
	}
	if json.Unmarshal(raw, &list) == nil {
		for _, e := range list {
			if f := nodeExport(e, key, depth+1); f != "" {
				return f
			}
		}
		return ""
	}
	if json.Unmarshal(raw, &m) != nil {
		return ""
	}
	if key == "./" {
		key = "."
	}
	for _, k := range []string{key, "require", "node", "node-addons", "import", "default"} {
		if e, ok := m[k]; ok {
			if f := nodeExport(e, "", depth+1); f != "" {
				return f
			}
		}
	}
	return ""
}

// nodeFile finds a file, with an ending or as a directory with a package.json.
func (a *analysis) nodeFile(name string) string {
	for _, ext := range []string{"", ".js", ".json", ".node", ".mjs", ".cjs"} {
		if a.isFile(name + ext) {
			return name + ext
		}
	}
	if !a.isDir(name) {
		return ""
	}
	if a.isFile(name + "/package.json") {
		a.add(name+"/package.json", Module)
		var p struct {
			Main string `json:"main"`
		}
		if json.Unmarshal(a.head(name+"/package.json", 1<<20), &p) == nil && p.Main != "" {
			main := path.Join(name, p.Main)
			for _, f := range []string{main, main + ".js", main + ".json", main + "/index.js"} {
				if a.isFile(f) {
					return f
				}
			}
		}
	}
	for _, f := range []string{"/index.js", "/index.json", "/index.node"} {
		if a.isFile(name + f) {
			return name + f
		}
	}
	return ""
}

var nodeBuiltin = func() map[string]bool {
	m := map[string]bool{}
	for _, n := range strings.Fields("assert async_hooks buffer child_process cluster console constants crypto dgram diagnostics_channel dns domain " +
		"events fs fs/promises http http2 https inspector module net os path path/posix perf_hooks process punycode querystring readline repl stream " +
		"string_decoder sys timers timers/promises tls trace_events tty url util v8 vm wasi worker_threads zlib") {
		m[n] = true
	}
	return m
}()
