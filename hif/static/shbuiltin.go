// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import "strings"

var shBuiltins map[string]func(r *shRun, argv []string, words []shWord)

func init() { // would be an initialization cycle
	nothing := func(*shRun, []string, []shWord) {}
	shBuiltins = map[string]func(*shRun, []string, []shWord){
		".": (*shRun).dot, "source": (*shRun).dot, "exec": (*shRun).replace, "command": (*shRun).inner, "builtin": (*shRun).inner,
		"cd": (*shRun).cd, "set": (*shRun).set, "shift": (*shRun).shift, "eval": (*shRun).eval,
		"export": (*shRun).export, "readonly": (*shRun).export, "local": (*shRun).export, "declare": (*shRun).export, "typeset": (*shRun).export,
		"exit": (*shRun).exit,
	}
	for _, name := range strings.Fields(": true false echo printf read return break continue trap umask ulimit unset wait type hash let " +
		"getopts jobs kill alias unalias shopt pwd times bg fg case in ] ]] mapfile readarray dirs pushd popd enable caller compgen complete") {
		shBuiltins[name] = nothing
	}
}

func (r *shRun) dot(argv []string, _ []shWord) {
	if len(argv) < 2 || strings.Contains(argv[1], unknown) {
		return
	}
	name := argv[1]
	if !strings.Contains(name, "/") && !r.a.isFile(name) {
		name = r.a.lookPath(name)
	}
	r.source(name)
}

// replace follows exec, after which a script that is not in a branch is over.
func (r *shRun) replace(argv []string, _ []shWord) {
	for argv = argv[1:]; len(argv) > 0 && strings.HasPrefix(argv[0], "-"); argv = argv[1:] {
		if argv[0] == "-a" && len(argv) > 1 {
			argv = argv[1:]
		}
	}
	if len(argv) == 0 || strings.Contains(argv[0], unknown) {
		return
	}
	r.a.arguments(invocation{}, argv[1:])
	r.a.exec(argv, r.depth+1)
	r.ended = !r.uncertain()
}

func (r *shRun) inner(argv []string, _ []shWord) {
	argv = argv[1:]
	if len(argv) > 0 && !strings.HasPrefix(argv[0], "-") {
		r.a.exec(argv, r.depth+1)
	}
}

func (r *shRun) cd(argv []string, _ []shWord) {
	if len(argv) > 1 && !r.uncertain() && r.a.isDir(argv[1]) {
		if real, n := r.a.resolve(argv[1]); n.ok {
			r.a.cwd = "/" + strings.TrimPrefix(real, ".")
		}
	}
}

// set follows "set -- NAME "$@"", by which entrypoints put the program before options: taken if the arguments so far do
// not begin with a program.
func (r *shRun) set(argv []string, _ []shWord) {
	if len(argv) < 3 || argv[1] != "--" {
		return
	}
	first := ""
	if len(r.args) > 1 {
		first = r.args[1]
	}
	if !r.uncertain() || first == "" || strings.HasPrefix(first, "-") || r.a.lookPath(first) == "" {
		r.args = append(r.args[:min(1, len(r.args)):1], argv[2:]...)
		return
	}
	// Another program in front of the same arguments, as "set -- gosu redis "$@"".
	if argv[len(argv)-1] == r.args[len(r.args)-1] {
		r.a.exec(argv[2:], r.depth+1)
	}
}

func (r *shRun) shift([]string, []shWord) {
	if !r.uncertain() && len(r.args) > 1 {
		r.args = append(r.args[:1:1], r.args[2:]...)
	}
}

func (r *shRun) eval(argv []string, _ []shWord) {
	r.script(strings.Join(argv[1:], " "))
}

// export keeps variables for programs too. Of what a script sets otherwise, programs see nothing.
func (r *shRun) export(argv []string, words []shWord) {
	for _, w := range words[min(1, len(words)):] {
		r.assign(w, true)
	}
	for _, arg := range argv {
		name, _, _ := strings.Cut(arg, "=")
		if v, ok := r.vars[name]; ok {
			r.a.env[name] = v
		}
	}
}

func (r *shRun) exit([]string, []shWord) {
	r.ended = !r.uncertain()
}
