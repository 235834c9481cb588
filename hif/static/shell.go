// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// shRun is a script that is read.
type shRun struct {
	a        *analysis
	shell    string
	depth    int
	vars     map[string]string
	args     []string // $0, $1, …
	text     int      // depth of scripts in scripts
	frames   []shFrame
	function bool // a function's name came before
	last     truth
	count    int // commands
	ended    bool
}

// unknown stands for a value, or a part of one, that only a run would tell. It is in no path.
const unknown = "\x00"

// shell follows sh, with its script in a file or after -c.
func (a *analysis) shell(i invocation) {
	args := i.argv[1:]
	run := &shRun{a: a, shell: i.argv[0], depth: i.depth, vars: map[string]string{}}
	if baseName(i.argv[0]) == "bash" && a.env["BASH_ENV"] != "" {
		a.add(a.env["BASH_ENV"], Script)
	}
	command := false
	for len(args) > 0 && (strings.HasPrefix(args[0], "-") || strings.HasPrefix(args[0], "+")) && args[0] != "-" {
		flag := args[0]
		args = args[1:]
		if flag == "--" {
			break
		}
		if strings.HasPrefix(flag, "--") {
			continue
		}
		if strings.Contains(flag, "l") && !strings.Contains(flag, "o") {
			run.login()
		}
		command = command || strings.Contains(flag, "c")
		if strings.Contains(flag, "o") && len(args) > 0 {
			args = args[1:]
		}
	}
	if len(args) == 0 {
		return
	}
	if command {
		run.args = append([]string{"sh"}, args[min(2, len(args)):]...)
		if len(args) > 1 {
			run.args[0] = args[1]
		}
		run.script(args[0])
		return
	}
	name := args[0]
	if !a.isFile(name) {
		if name = a.lookPath(name); name == "" {
			return
		}
	}
	a.add(name, Script)
	run.args = append([]string{name}, args[1:]...)
	text := string(a.contents(name))
	if real, n := a.resolve(name); n.ok && linkLoop.MatchString(text) {
		run.args[0] = "/" + real
	}
	run.vars["BASH_SOURCE"] = run.args[0]
	run.script(text)
}

// linkLoop is how scripts follow the links that they were called by, in loops that are not followed here.
var linkLoop = regexp.MustCompile(`\[\s+-[hL]\s+"?\$`)

// login predicts what a login shell reads first.
func (r *shRun) login() {
	r.source("/etc/profile")
	for _, f := range []string{".bash_profile", ".profile"} {
		r.source(path.Join(r.a.env["HOME"], f))
	}
}

func (r *shRun) source(name string) {
	const deepest = 8
	if real, ok := r.a.add(name, Script); ok && r.text < deepest {
		key := "source\x00" + real
		if r.a.running[key] {
			return
		}
		r.a.running[key] = true
		r.script(string(r.a.contents(name)))
	}
}

// script reads the commands of a text, one after the other, but for branches that are known not to be taken.
func (r *shRun) script(text string) {
	const deepest = 10
	if r.text >= deepest || !r.a.spend(len(text)) {
		return
	}
	r.text++
	open := len(r.frames)
	defer func() {
		r.text--
		r.frames = r.frames[:min(open, len(r.frames))]
	}()
	l := &shLexer{s: text}
	var words []shWord
	pattern, redirect, op := false, "", ""
	for !r.ended && !r.a.stopped() {
		t, ok := l.next()
		if ok && t.op == "" {
			literal := t.word.literal()
			switch {
			case redirect == "<":
				if name, ok := r.expand(t.word); ok && !r.dead() {
					r.a.add(name, Argument)
				}
			case redirect != "":
			case pattern && literal == "esac" && len(words) == 0:
				pattern = false
				r.pop("case")
			case pattern:
				words = append(words, t.word)
			case literal == "in" && len(words) == 2 && words[0].literal() == "case":
				pattern = true
				r.push("case", no)
				r.chosen(words[1])
				words = nil
			default:
				words = append(words, t.word)
			}
			redirect = ""
			continue
		}
		if ok && strings.ContainsAny(t.op, "<>") {
			if t.op != "<<" {
				redirect = t.op
			}
			continue
		}
		redirect = ""
		if ok && pattern {
			if t.op == ")" {
				r.pattern(words)
				pattern, words = false, nil
			}
			continue
		}
		r.nested(l)
		if ok && t.op == "(" && len(words) == 1 {
			words, r.function = nil, true // NAME(): what a function does is read where it stands
			continue
		}
		if len(words) > 0 {
			r.command(words, op)
			words, op = nil, ""
		}
		if !ok {
			return
		}
		if t.op == "&&" || t.op == "||" || t.op == "|" {
			op = t.op
		}
		if pattern = strings.HasPrefix(t.op, ";;") && r.inside("case"); pattern {
			r.endPattern()
		}
	}
}

// nested reads the command substitutions of a command, which change nothing outside.
func (r *shRun) nested(l *shLexer) {
	texts := l.nested
	l.nested = nil
	if r.dead() {
		return
	}
	for _, n := range texts {
		inner := *r
		inner.vars = maps.Clone(r.vars)
		inner.frames = slices.Clone(r.frames)
		cwd := r.a.cwd
		inner.script(n)
		r.a.cwd = cwd
		r.count = inner.count
	}
}

func (w shWord) literal() string {
	if w.quoted || len(w.parts) != 1 || w.parts[0].variable {
		return ""
	}
	return w.parts[0].text
}

// command follows one simple command, with the operator before it.
func (r *shRun) command(words []shWord, op string) {
	const most = 20_000
	if r.count++; r.count > most {
		r.ended = true
		return
	}
	not := false
	for len(words) > 0 {
		first := words[0].literal()
		if !r.keyword(first, words) {
			if first == "!" {
				not = !not
			} else if first != "time" && first != "coproc" {
				break
			}
		}
		if first == "for" || first == "select" {
			return
		}
		words = words[1:]
		if first == "function" && len(words) > 0 {
			words, r.function = words[1:], true
		}
	}
	if len(words) == 0 || r.dead() || op == "&&" && r.last == no || op == "||" && r.last == yes {
		return
	}
	if op == "&&" || op == "||" {
		r.push("list", maybe)
		if r.last != maybe {
			r.frames[len(r.frames)-1].now = yes
		}
		defer r.pop("list")
	}
	result := r.simple(words)
	if not {
		result = -result
	}
	if f := r.condition(); f != nil {
		switch op {
		case "&&":
			result = min(r.last, result)
		case "||":
			result = max(r.last, result)
		}
		f.cond = result
	}
	r.last = result
}

// simple follows a command without keywords and says how it ended, if that can be told.
func (r *shRun) simple(words []shWord) truth {
	for len(words) > 0 && r.assign(words[0], true) {
		words = words[1:]
		if len(words) == 0 {
			return yes
		}
	}
	argv := r.fields(words)
	if len(argv) == 0 || argv[0] == "" || strings.Contains(argv[0], unknown) {
		return maybe
	}
	switch argv[0] {
	case "true", ":":
		return yes
	case "false":
		return no
	case "[", "[[", "test":
		return r.test(argv)
	}
	if b := shBuiltins[argv[0]]; b != nil {
		b(r, argv, words)
		return maybe
	}
	r.a.arguments(invocation{}, argv[1:])
	r.a.exec(argv, r.depth+1)
	return maybe
}

// loop takes the first value of a for loop.
func (r *shRun) loop(words []shWord) {
	if len(words) > 3 && words[2].literal() == "in" {
		values := r.fields(words[3:])
		for _, v := range values {
			if strings.HasPrefix(v, "/") {
				r.a.add(v, Argument)
			}
		}
	}
	if len(words) > 1 {
		r.vars[words[1].literal()] = unknown
	}
}

// assign keeps NAME=VALUE. ok: it is one.
func (r *shRun) assign(w shWord, keep bool) bool {
	if len(w.parts) == 0 || w.parts[0].variable {
		return false
	}
	name, rest, ok := strings.Cut(w.parts[0].text, "=")
	if name = strings.TrimSuffix(name, "+"); !ok || !isName(name) {
		return false
	}
	value := shWord{parts: append([]shPart{{text: rest}}, w.parts[1:]...), quoted: true}
	// What a script sets first is mostly what holds; branches that may not run are for special cases.
	// A value that is made of the old one is the same in a better form.
	own := slices.ContainsFunc(w.parts, func(p shPart) bool {
		return p.variable && (p.text == name || strings.Contains(p.command, "$"+name) || strings.Contains(p.command, "${"+name))
	})
	if old := r.vars[name]; keep && (old == "" || own || strings.Contains(old, unknown) || !r.uncertain()) {
		r.vars[name], _ = r.expand(value)
	}
	return true
}
