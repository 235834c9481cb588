// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"strings"
)

// perl is an installation of Perl with what a process of it has loaded.
type perl struct {
	a     *analysis
	proc  *process
	paths []string
	seen  map[string]bool
	depth int
}

var (
	plUse  = regexp.MustCompile(`^(\s*)(?:BEGIN\s*\{\s*)?(use|no|require)\s+([A-Za-z_][\w:]*|['"][\w/.]+['"])\s*(.*)$`)
	plName = regexp.MustCompile(`[A-Za-z_]\w*(?:::\w+)+|\b[A-Z]\w+\b`)
	plXS   = regexp.MustCompile(`\bXSLoader::load\b|\bbootstrap\s+[A-Z]|\bDynaLoader\b.*\bISA\b|\bISA\b.*\bDynaLoader\b`)
)

// perlModules gives the modules that a text uses, and whether it has a part in C. "use" is done when the text is read,
// wherever it stands; "require" when it is reached, so one that is indented is left out unless all is set.
func perlModules(text string, all bool) (found []string, native bool) {
	const most = 5_000
	pod := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasPrefix(line, "=") && len(line) > 1 && line[1] >= 'a' && line[1] <= 'z' {
			pod = !strings.HasPrefix(line, "=cut")
			continue
		}
		if pod || len(line) > 4096 {
			continue
		}
		if line == "__END__" || line == "__DATA__" || len(found) >= most {
			break
		}
		native = native || plXS.MatchString(line)
		m := plUse.FindStringSubmatch(line)
		if m == nil || m[2] == "require" && m[1] != "" && !all {
			continue
		}
		name := strings.Trim(m[3], `'"`)
		found = append(found, name)
		if name == "parent" || name == "base" {
			rest, _, _ := strings.Cut(m[4], ";")
			if !strings.Contains(rest, "-norequire") {
				found = append(found, plName.FindAllString(strings.TrimPrefix(rest, "qw"), 100)...)
			}
		}
	}
	return found, native
}

// plWith are modules that others require by a name made up at run time, or nearly always.
var plWith = map[string][]string{
	"Exporter": {"Exporter::Heavy"}, "Carp": {"Carp::Heavy"}, "File::Spec": {"File::Spec::Unix"}, "LWP::UserAgent": {"URI", "LWP::Protocol"},
	"JSON": {"JSON::PP"},
}

func (a *analysis) perl(i invocation) {
	real, _ := a.resolve(i.name)
	p := a.engines.perl[real]
	if p == nil {
		p = &perl{a: a, proc: i.proc, seen: map[string]bool{}}
		for _, dir := range strings.Split(a.env["PERL5LIB"], ":") {
			if dir != "" {
				p.paths = append(p.paths, dir)
			}
		}
		// @INC of Debian's, then of one built from source, then of Alpine's and Red Hat's.
		for _, pattern := range []string{
			"/etc/perl", "/usr/local/lib/*/perl/5.*", "/usr/local/share/perl/5.*", "/usr/lib/*/perl5/5.*", "/usr/share/perl5", "/usr/lib/*/perl-base",
			"/usr/lib/*/perl/5.*", "/usr/share/perl/5.*", "/usr/local/lib/site_perl",
			"/usr/local/lib/perl5/site_perl/5.*/*-linux*", "/usr/local/lib/perl5/site_perl/5.*", "/usr/local/lib/perl5/5.*/*-linux*", "/usr/local/lib/perl5/5.*",
			"/usr/lib/perl5/vendor_perl", "/usr/share/perl5/vendor_perl", "/usr/lib/perl5/core_perl", "/usr/share/perl5/core_perl", "/usr/lib64/perl5",
		} {
			p.paths = append(p.paths, a.glob(pattern)...)
		}
		if a.engines.perl == nil {
			a.engines.perl = map[string]*perl{}
		}
		a.engines.perl[real] = p
	}
	args := i.argv[1:]
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "-e" || arg == "-E":
			if len(args) > 0 {
				p.follow(args[0], "", true)
			}
			return
		case strings.HasPrefix(arg, "-M") || strings.HasPrefix(arg, "-m"):
			name, _, _ := strings.Cut(strings.TrimLeft(arg[2:], "-"), "=")
			p.load(name)
		case strings.HasPrefix(arg, "-I") && len(arg) > 2:
			p.paths = append([]string{arg[2:]}, p.paths...)
		case arg == "-I" && len(args) > 0:
			p.paths = append([]string{args[0]}, p.paths...)
			args = args[1:]
		case arg == "-S" && len(args) > 0:
			if f := a.lookPath(args[0]); f != "" {
				args[0] = f
			}
		}
	}
	if len(args) == 0 {
		return
	}
	if _, ok := a.add(args[0], Script); ok {
		p.follow(string(a.contents(args[0])), "", true)
	}
	a.arguments(i, args[1:])
}

func (p *perl) load(module string) {
	const deepest, most = 200, 10_000
	if p.seen[module] || p.depth > deepest || len(p.seen) > most || p.a.stopped() {
		return
	}
	p.seen[module] = true
	file := strings.ReplaceAll(module, "::", "/")
	if path.Ext(file) != ".pl" && path.Ext(file) != ".pm" {
		file += ".pm"
	}
	for _, dir := range p.paths {
		if f := path.Join(dir, file); p.a.isFile(f) {
			p.a.add(f, Module)
			p.depth++
			p.follow(string(p.a.contents(f)), module, false)
			for _, m := range plWith[module] {
				p.load(m)
			}
			p.depth--
			return
		}
	}
}

func (p *perl) follow(text, module string, main bool) {
	if !p.a.spend(len(text)) {
		return
	}
	modules, native := perlModules(text, main)
	for _, m := range modules {
		p.load(m)
	}
	if native && module != "" {
		p.load("XSLoader")
		p.native(module)
	}
}

// native predicts the part in C of a module: auto/A/B/B.so somewhere on the path.
func (p *perl) native(module string) {
	dir := strings.ReplaceAll(module, "::", "/")
	for _, at := range p.paths {
		if p.a.dlopen(p.proc, path.Join(at, "auto", dir, path.Base(dir)+".so"), Module) {
			return
		}
	}
}
