// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"slices"
	"strconv"
	"strings"
)

// python is an installation of Python with what a process of it has imported.
type python struct {
	a     *analysis
	proc  *process
	minor int
	tag   string // cpython-311
	lib   string // the standard library
	paths []string
	seen  map[string]bool // modules: whether they were found
	lazy  map[string]pyLazy
	depth int
}

func (a *analysis) python(i invocation) {
	p := a.pythonAt(i)
	if p == nil {
		return
	}
	if a.localeName() == "" {
		// An interpreter in the locale "C" takes C.UTF-8 (PEP 538).
		a.locale(i.proc.object(), "C.UTF-8", []string{"LC_CTYPE"})
	}
	args := i.argv[1:]
	var script, module, code string
	noSite := false
options:
	for len(args) > 0 && strings.HasPrefix(args[0], "-") && args[0] != "-" {
		arg := args[0]
		args = args[1:]
		switch {
		case strings.HasPrefix(arg, "-m") || strings.HasPrefix(arg, "-c"):
			value := arg[2:]
			if value == "" && len(args) > 0 {
				value, args = args[0], args[1:]
			}
			if arg[1] == 'm' {
				module = value
			} else {
				code = value
			}
			break options
		case arg == "-X" || arg == "-W":
			args = args[min(1, len(args)):]
		case !strings.HasPrefix(arg, "--"):
			noSite = noSite || strings.Contains(arg, "S")
		}
	}
	if script == "" && module == "" && code == "" && len(args) > 0 {
		script, args = args[0], args[1:]
	}
	first := a.cwd
	if script != "" {
		real, _ := a.resolve(script)
		first = "/" + path.Dir(real)
	}
	p.paths = append([]string{first}, p.paths...)
	for _, m := range pyStart {
		p.load(m, Startup)
	}
	if !noSite {
		p.site()
	}
	switch {
	case module != "":
		p.load("runpy", Startup)
		if !p.load(module+".__main__", Script) {
			p.load(module, Script)
		}
		p.source(p.find(module), module, true)
	case code != "":
		p.follow(code, "__main__", false, true)
	case script != "":
		p.script(script)
	}
	p.arguments(args)
}

func (p *process) object() *object {
	if p == nil {
		return nil
	}
	return p.main.object
}

// pythonAt finds the standard library of an interpreter: beside it, or where PYTHONHOME says.
func (a *analysis) pythonAt(i invocation) *python {
	real, _ := a.resolve(i.name)
	if p := a.engines.python[real]; p != nil {
		return p
	}
	prefix := path.Dir(path.Dir("/" + real))
	if home := a.env["PYTHONHOME"]; home != "" {
		prefix = home
	}
	version := strings.TrimPrefix(path.Base(real), "python")
	if !strings.HasPrefix(version, "3.") {
		version = ""
		for _, lib := range a.glob(path.Join(prefix, "lib/python3.*")) {
			version = strings.TrimPrefix(path.Base(lib), "python")
		}
	}
	minor, err := strconv.Atoi(strings.TrimPrefix(version, "3."))
	if err != nil {
		return nil
	}
	p := &python{
		a: a, proc: i.proc, minor: minor, tag: "cpython-3" + strconv.Itoa(minor), lib: path.Join(prefix, "lib/python"+version), seen: map[string]bool{}, lazy: map[string]pyLazy{},
	}
	p.paths = slices.DeleteFunc(strings.Split(a.env["PYTHONPATH"], ":"), func(s string) bool { return s == "" })
	p.paths = append(p.paths, p.lib, p.lib+"/lib-dynload")
	// A virtual environment is where the interpreter was called, by its file pyvenv.cfg.
	if venv := path.Dir(path.Dir(i.name)); a.isFile(venv + "/pyvenv.cfg") {
		a.add(venv+"/pyvenv.cfg", Config)
		p.paths = append(p.paths, path.Join(venv, "lib/python"+version, "site-packages"))
	} else {
		p.paths = append(p.paths, path.Join(prefix, "local/lib/python"+version, "dist-packages"), path.Join(prefix, "lib/python3/dist-packages"),
			path.Join(prefix, "lib/python"+version, "dist-packages"), path.Join(prefix, "lib/python"+version, "site-packages"))
	}
	a.add(path.Join(prefix, "lib", "python3"+strconv.Itoa(minor)+".zip"), Startup)
	if a.engines.python == nil {
		a.engines.python = map[string]*python{}
	}
	a.engines.python[real] = p
	return p
}

// site does what the module site does: .pth files, and the modules for customization.
func (p *python) site() {
	for _, dir := range p.paths {
		if base := path.Base(dir); base != "site-packages" && base != "dist-packages" {
			continue
		}
		for _, pth := range p.a.glob(dir + "/*.pth") {
			p.a.add(pth, Startup)
			for line := range strings.Lines(string(p.a.head(pth, 64<<10))) {
				line = strings.TrimSpace(line)
				if strings.HasPrefix(line, "import ") {
					p.follow(line, "", false, true)
				} else if line != "" && line[0] != '#' && p.a.isDir(path.Join(dir, line)) && len(p.paths) < 100 {
					p.paths = append(p.paths, path.Join(dir, line))
				}
			}
		}
	}
	p.load("sitecustomize", Startup)
	p.load("usercustomize", Startup)
}

func (p *python) script(name string) {
	if p.a.isDir(name) {
		p.paths[0] = name
		p.load("__main__", Script)
		name = path.Join(name, "__main__.py")
	}
	p.a.add(name, Script)
	p.follow(string(p.a.contents(name)), "__main__", false, true)
}

// pyFound is where a module is.
type pyFound struct {
	source string // the text, "" if none
	open   string // what the interpreter opens
	dir    string // of a package
	native bool
	ok     bool
}

// find looks for a module as the interpreter's finders do.
func (p *python) find(module string) (f pyFound) {
	dirs := p.paths
	// The package resolves these names itself.
	if rest, ok := strings.CutPrefix(module, "pkg_resources.extern."); ok {
		module = "pkg_resources._vendor." + rest
	}
	base := module
	if parent, last, ok := cutLast(module, "."); ok {
		base = last
		up := p.find(parent)
		if up.dir == "" {
			return f
		}
		dirs = []string{up.dir}
	}
	for _, dir := range dirs {
		d := path.Join(dir, base)
		names := p.a.list(dir)
		if _, ok := slices.BinarySearch(names, base); ok && p.a.isDir(d) {
			if init := d + "/__init__.py"; p.a.isFile(init) {
				return pyFound{source: init, open: p.compiled(init), dir: d, ok: true}
			}
			f = pyFound{dir: d, ok: true} // a namespace, if nothing better comes
		}
		at, _ := slices.BinarySearch(names, base+".")
		var text, native string
		for ; at < len(names) && strings.HasPrefix(names[at], base+"."); at++ {
			switch ext := names[at][len(base):]; {
			case ext == ".py" || ext == ".pyc" && text == "":
				text = path.Join(dir, names[at])
			case strings.HasPrefix(ext, "."+p.tag) && strings.HasSuffix(ext, ".so") || ext == ".abi3.so" || ext == ".so":
				native = path.Join(dir, names[at])
			}
		}
		if native != "" {
			return pyFound{open: native, native: true, ok: true}
		}
		if text != "" {
			return pyFound{source: text, open: p.compiled(text), ok: true}
		}
	}
	return f
}

// compiled is what is opened instead of a text.
func (p *python) compiled(source string) string {
	stem := strings.TrimSuffix(path.Base(source), ".py")
	if c := path.Join(path.Dir(source), "__pycache__", stem+"."+p.tag+".pyc"); p.a.isFile(c) {
		return c
	}
	return source
}

// load imports a module with the packages it is in. It says if the module exists.
func (p *python) load(module string, why Reason) bool {
	if ok, done := p.seen[module]; done {
		return ok
	}
	const deepest, most = 200, 10_000
	if p.depth > deepest || len(p.seen) > most || len(module) > 256 || p.a.stopped() {
		return false
	}
	p.seen[module] = true // against imports in a circle
	p.depth++
	defer func() { p.depth-- }()
	if parent, _, ok := cutLast(module, "."); ok && !p.load(parent, why) {
		p.seen[module] = false
		return false
	}
	if slices.Contains(pyBuiltin, module) || p.builtin(module) {
		p.fromC(module)
		return true
	}
	f := p.find(module)
	p.seen[module] = f.ok
	if !f.ok {
		return false
	}
	frozen := p.minor >= 11 && slices.Contains(pyFrozen, module)
	switch {
	case f.native:
		p.a.dlopen(p.proc, f.open, Module)
		p.fromC(module)
	case !frozen:
		p.a.add(f.open, why)
	}
	p.source(f, module, false)
	for _, m := range pyWith[module] {
		p.load(m, Module)
	}
	if module == "importlib.metadata" || module == "pkg_resources" {
		p.entryPoints()
	}
	return true
}

// builtin says if the interpreter has a module built in, by the name of its entry.
func (p *python) builtin(module string) bool {
	if p.proc == nil || strings.Contains(module, ".") {
		return false
	}
	entry := "PyInit_" + module
	if p.proc.main.has(entry) {
		return true
	}
	for _, needed := range p.proc.main.needed {
		if strings.HasPrefix(needed, "libpython") {
			if o := p.a.object(p.a.findLibrary(p.proc, p.proc.main, needed)); o != nil && o.has(entry) {
				return true
			}
		}
	}
	return false
}

func (p *python) fromC(module string) {
	for _, m := range pyFromC[module] {
		p.load(m, Module)
	}
}

func (p *python) source(f pyFound, module string, main bool) {
	if strings.HasSuffix(f.source, ".py") {
		p.follow(string(p.a.contents(f.source)), module, f.dir != "", main)
	}
}

// follow loads what a text imports. Imports within functions are followed in the main program, not in modules: most
// functions of modules are not called at a start.
func (p *python) follow(text, module string, isPackage, main bool) {
	if !p.a.spend(len(text)) {
		return
	}
	if main {
		p.entryPoint(text)
	}
	failed := map[int]bool{}
	for _, i := range pyImports(text, main, p.minor) {
		if i.inner && !main {
			if i.lazy {
				for _, n := range i.names {
					p.lazy[module+"."+n] = pyLazy{i, isPackage}
				}
			}
			continue
		}
		if i.unless != 0 && !failed[i.unless] {
			continue
		}
		name := i.absolute(module, isPackage)
		if name == "" {
			continue
		}
		ok := p.load(name, Module)
		for _, sub := range i.names {
			if ok && sub != "*" && p.find(name).dir != "" && p.find(name+"."+sub).ok {
				p.load(name+"."+sub, Module)
			} else if l, has := p.lazy[name+"."+sub]; ok && has {
				p.load(l.absolute(name, l.isPackage), Module)
			}
		}
		if !ok {
			failed[i.try] = true
		}
	}
}

// pyLazy is an import in a module's __getattr__: done when one of its names is first used.
type pyLazy struct {
	pyImport
	isPackage bool
}

// absolute is the name of the module that an import in another one means.
func (i pyImport) absolute(in string, isPackage bool) string {
	if i.level == 0 {
		return i.module
	}
	up := i.level
	if isPackage {
		up--
	}
	for ; up > 0; up-- {
		if parent, _, ok := cutLast(in, "."); ok {
			in = parent
		} else {
			in = ""
		}
	}
	return strings.Trim(in+"."+i.module, ".")
}

// cutLast cuts at the last separator.
func cutLast(s, sep string) (before, after string, ok bool) {
	if n := strings.LastIndex(s, sep); n >= 0 {
		return s[:n], s[n+len(sep):], true
	}
	return "", s, false
}
