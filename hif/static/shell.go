// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"slices"
	"strings"
)

// shRun is a script that is read.
type shRun struct {
	a     *analysis
	shell string
	depth int
	vars  map[string]string
	args  []string // $0, $1, …
	block int      // depth of if, while, case and the like
	text  int      // depth of scripts in scripts
	count int      // commands
	ended bool
}

// unknown stands for a value that only a run would tell. It is in no path.
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
	run.vars["BASH_SOURCE"] = name
	run.script(string(a.contents(name)))
}

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

// script reads the commands of a text, one after the other, those of all branches.
func (r *shRun) script(text string) {
	if r.text++; r.text > 10 {
		r.text--
		return
	}
	defer func() { r.text-- }()
	l := &shLexer{s: text}
	var words []shWord
	pattern, caseDepth := false, 0
	redirect := ""
	for !r.ended && !r.a.stopped() {
		t, ok := l.next()
		if ok && t.op == "" {
			literal := t.word.literal()
			switch {
			case redirect == "<":
				if name, ok := r.expand(t.word); ok {
					r.a.add(name, Argument)
				}
			case redirect != "":
			case pattern && literal == "esac" && len(words) == 0:
				pattern, caseDepth = false, caseDepth-1
				r.block--
			case pattern:
			case literal == "in" && len(words) == 2 && words[0].literal() == "case":
				words, pattern = nil, true
				caseDepth++
				r.block++
			case literal == "esac" && len(words) == 0 && caseDepth > 0:
				caseDepth--
				r.block--
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
				pattern = false
			}
			continue
		}
		nested := l.nested
		l.nested = nil
		for _, n := range nested {
			inner := *r
			inner.args = r.args
			inner.script(n)
			r.count = inner.count
		}
		switch {
		case ok && t.op == "(" && len(words) == 1:
			words = nil // NAME(): what a function does is read where it stands
		default:
			r.command(words)
			words = nil
		}
		if ok && strings.HasPrefix(t.op, ";;") && caseDepth > 0 {
			pattern = true
		}
		if !ok {
			return
		}
	}
}

func (w shWord) literal() string {
	if w.quoted || len(w.parts) != 1 || w.parts[0].variable {
		return ""
	}
	return w.parts[0].text
}

// expand gives a word's value. ok is false if only a run would tell.
func (r *shRun) expand(w shWord) (string, bool) {
	const longest = 64 << 10
	var b strings.Builder
	for _, p := range w.parts {
		if !p.variable {
			b.WriteString(p.text)
			continue
		}
		v, ok := r.value(p)
		if !ok || strings.Contains(v, unknown) || b.Len()+len(v) > longest {
			return unknown, false
		}
		b.WriteString(v)
	}
	s := b.String()
	if strings.HasPrefix(s, "~/") && !w.quoted {
		s = r.a.env["HOME"] + s[1:]
	}
	return s, true
}

func (r *shRun) value(p shPart) (string, bool) {
	if len(p.text) == 1 && p.text[0] >= '0' && p.text[0] <= '9' {
		if n := int(p.text[0] - '0'); n < len(r.args) && r.args[n] != "" {
			return r.args[n], true
		}
		return p.fallback, true
	}
	if v, ok := r.vars[p.text]; ok && v != "" {
		return v, true
	}
	if v, ok := r.a.env[p.text]; ok && v != "" {
		return v, true
	}
	return p.fallback, p.fallback != ""
}

// fields expands words to arguments: "$@" to several, an unquoted variable to its words.
func (r *shRun) fields(words []shWord) []string {
	const most = 1000
	var out []string
	for _, w := range words {
		if len(w.parts) == 1 && w.parts[0].variable && (w.parts[0].text == "@" || w.parts[0].text == "*") {
			if len(r.args) > 1 {
				out = append(out, r.args[1:]...)
			}
			continue
		}
		s, ok := r.expand(w)
		switch {
		case !ok:
			out = append(out, unknown)
		case !w.quoted && len(w.parts) > 0 && w.parts[0].variable:
			out = append(out, strings.Fields(s)...)
		case !w.quoted && strings.ContainsAny(s, "*?["):
			if found := r.a.glob(s); len(found) > 0 {
				out = append(out, found...)
			} else {
				out = append(out, s)
			}
		default:
			out = append(out, s)
		}
		if len(out) > most {
			return out[:most]
		}
	}
	return out
}

var shOpening = []string{"if", "while", "until", "for", "select"}

// command follows one simple command.
func (r *shRun) command(words []shWord) {
	const most = 20_000
	if r.count++; r.count > most {
		r.ended = true
		return
	}
	for len(words) > 0 {
		first := words[0].literal()
		switch {
		case slices.Contains([]string{"then", "else", "elif", "do", "{", "!", "time", "coproc"}, first):
			words = words[1:]
			continue
		case first == "if" || first == "while" || first == "until":
			r.block++
			words = words[1:]
			continue
		case first == "for" || first == "select":
			r.block++
			r.loop(words)
			return
		case first == "fi" || first == "done" || first == "}":
			if first != "}" {
				r.block--
			}
			words = words[1:]
			continue
		case first == "function":
			return
		}
		if !r.assign(words[0], true) {
			break
		}
		words = words[1:]
	}
	argv := r.fields(words)
	if len(argv) == 0 || argv[0] == "" || argv[0] == unknown {
		return
	}
	if b := shBuiltins[argv[0]]; b != nil {
		b(r, argv, words)
		return
	}
	r.a.arguments(invocation{}, argv[1:])
	r.a.exec(argv, r.depth+1)
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
		delete(r.vars, words[1].literal())
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
	if v, ok := r.expand(value); ok && keep {
		r.vars[name] = v
	} else if !ok {
		delete(r.vars, name)
	}
	return true
}
