// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"runtime"
	"slices"
	"strings"
)

// truth is what is known of a condition. The negation is the negative, "and" the minimum, "or" the maximum.
type truth int

const (
	no    truth = -1
	maybe truth = 0
	yes   truth = 1
)

// shFrame is an open construct.
type shFrame struct {
	kind    string // "if", "loop", "case", "{", "list"
	now     truth  // whether the commands that follow run
	cond    truth  // how the condition ended, while it is read
	reading bool   // the condition is read
	taken   bool   // a branch before ran for sure
	open    bool   // a branch before may have run
	word    string // of case
}

func (r *shRun) push(kind string, now truth) {
	const deepest = 200
	if len(r.frames) >= deepest {
		r.ended = true
		return
	}
	r.frames = append(r.frames, shFrame{kind: kind, now: now})
}

// pop closes the innermost construct of a kind. What a script leaves open in it is closed too.
func (r *shRun) pop(kind string) {
	for i := len(r.frames) - 1; i >= 0; i-- {
		if r.frames[i].kind == kind {
			r.frames = r.frames[:i]
			return
		}
	}
}

// chosen begins a case, of whose patterns none was read.
func (r *shRun) chosen(word shWord) {
	if n := len(r.frames); n > 0 {
		r.frames[n-1].word, _ = r.expand(word)
	}
}

// pattern begins a branch of a case.
func (r *shRun) pattern(words []shWord) {
	f := &shFrame{}
	if n := len(r.frames); n > 0 && r.frames[n-1].kind == "case" {
		f = &r.frames[n-1]
	}
	match := no
	for _, w := range words {
		p, known := r.expand(w)
		ok, err := path.Match(p, strings.ReplaceAll(f.word, "/", "\x01"))
		if strings.Contains(p, "/") {
			ok = p == f.word
		}
		switch {
		case !known || err != nil || strings.Contains(f.word, unknown):
			match = max(match, maybe)
		case ok:
			match = yes
		}
	}
	switch {
	case f.taken:
		match = no
	case f.open && match == yes:
		match = maybe
	}
	f.now = match
	f.taken = f.taken || match == yes
	f.open = f.open || match == maybe
}

func (r *shRun) endPattern() {
	if n := len(r.frames); n > 0 && r.frames[n-1].kind == "case" {
		r.frames[n-1].now = no
	}
}

func (r *shRun) inside(kind string) bool {
	return len(r.frames) > 0 && slices.ContainsFunc(r.frames, func(f shFrame) bool { return f.kind == kind })
}

// dead says that the commands read now do not run.
func (r *shRun) dead() bool {
	return slices.ContainsFunc(r.frames, func(f shFrame) bool { return f.now == no })
}

// uncertain says that they may not run.
func (r *shRun) uncertain() bool {
	return slices.ContainsFunc(r.frames, func(f shFrame) bool { return f.now != yes })
}

// condition is the frame whose condition is read.
func (r *shRun) condition() *shFrame {
	if len(r.frames) == 0 {
		return nil
	}
	for i := len(r.frames) - 1; i >= 0; i-- {
		if f := &r.frames[i]; f.kind != "list" {
			if f.reading {
				return f
			}
			return nil
		}
	}
	return nil
}

// keyword follows a word that opens, parts or closes a construct. It says if it is one.
func (r *shRun) keyword(word string, words []shWord) bool {
	top := func(kind string) *shFrame {
		if n := len(r.frames); n > 0 && r.frames[n-1].kind == kind {
			return &r.frames[n-1]
		}
		return &shFrame{} // of a text that is no script
	}
	switch word {
	case "if":
		r.push("if", yes)
		top("if").reading = true
	case "then":
		f := top("if")
		f.reading = false
		if f.now = f.cond; f.taken {
			f.now = no
		}
		f.taken = f.taken || f.now == yes
		f.open = f.open || f.now == maybe
	case "elif", "else":
		f := top("if")
		switch {
		case f.taken:
			f.now = no
		case f.open:
			f.now = maybe
		default:
			f.now = yes
		}
		f.cond, f.reading = maybe, word == "elif"
	case "fi":
		r.pop("if")
	case "while", "until":
		r.push("loop", maybe)
	case "for", "select":
		r.push("loop", maybe)
		if !r.dead() {
			r.loop(words)
		}
	case "do":
	case "done":
		r.pop("loop")
	case "{":
		now := yes
		if r.function {
			now, r.function = maybe, false
		}
		r.push("{", now)
	case "}":
		r.pop("{")
	case "esac":
		r.pop("case")
	case "function":
	default:
		return false
	}
	return true
}

// test evaluates a condition of one comparison.
func (r *shRun) test(argv []string) truth {
	args := argv[1:]
	if n := len(args); n > 0 && (args[n-1] == "]" || args[n-1] == "]]") {
		args = args[:n-1]
	}
	of := func(b bool) truth {
		if b {
			return yes
		}
		return no
	}
	if len(args) > 0 && args[0] == "!" {
		return -r.test(append([]string{"["}, args[1:]...))
	}
	if slices.ContainsFunc(args, func(s string) bool { return strings.Contains(s, unknown) }) {
		return maybe
	}
	switch len(args) {
	case 0:
		return no
	case 1:
		return of(args[0] != "" && args[0] != "-n")
	case 2:
		_, n := r.a.resolve(args[1])
		switch args[0] {
		case "-z":
			return of(args[1] == "")
		case "-n":
			return of(args[1] != "")
		case "-f", "-x", "-e", "-r", "-s", "-d":
			if !n.ok && !strings.HasPrefix(args[1], "/") || volatile(args[1]) {
				return maybe
			}
			switch args[0] {
			case "-f":
				return of(n.ok && n.mode.IsRegular())
			case "-d":
				return of(n.ok && n.mode.IsDir())
			case "-s":
				return of(n.ok && n.size > 0)
			}
			return of(n.ok)
		}
	case 3:
		switch args[1] {
		case "=", "==":
			if strings.ContainsAny(args[2], "*?[") {
				return maybe
			}
			return of(args[0] == args[2])
		case "!=":
			return of(args[0] != args[2])
		}
	}
	return maybe
}

// volatile says that what is at a path at run time need not be what the image has: mounts, and what services write.
func volatile(name string) bool {
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/var", "/tmp", "/data", "/mnt", "/srv"} {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

// substitute gives the output of the few commands that scripts find themselves and programs by.
func (r *shRun) substitute(text string) string {
	if r.text > 10 || !r.a.spend(len(text)) {
		return unknown
	}
	l := &shLexer{s: text}
	var words []shWord
	dir := r.a.cwd
	for {
		t, ok := l.next()
		if ok && t.op == "" {
			words = append(words, t.word)
			continue
		}
		if ok && (t.op == ">" || t.op == ">&" || t.op == "&>") {
			l.next()
			if n := len(words); n > 0 && (words[n-1].literal() == "2" || words[n-1].literal() == "1") {
				words = words[:n-1]
			}
			continue
		}
		if ok && t.op != "&&" && t.op != ";" && t.op != "(" && t.op != ")" {
			return unknown
		}
		if len(words) == 0 {
			if !ok {
				return unknown
			}
			continue
		}
		r.text++
		argv := r.fields(words)
		r.text--
		words = nil
		if len(argv) == 0 || slices.ContainsFunc(argv, func(s string) bool { return strings.Contains(s, unknown) }) {
			return unknown
		}
		last := argv[len(argv)-1]
		switch {
		case argv[0] == "cd" && len(argv) > 1:
			if dir = last; !strings.HasPrefix(dir, "/") {
				dir = path.Join(r.a.cwd, dir)
			}
			if !r.a.isDir(dir) {
				return unknown
			}
			continue
		case argv[0] == "pwd":
			if len(argv) > 1 { // pwd -P
				real, _ := r.a.resolve(dir)
				return path.Join("/", real)
			}
			return path.Clean(dir)
		case argv[0] == "dirname" && len(argv) > 1:
			return path.Dir(last)
		case argv[0] == "basename" && len(argv) == 2:
			return path.Base(last)
		case (argv[0] == "readlink" || argv[0] == "realpath") && len(argv) > 1:
			if real, n := r.a.resolve(last); n.ok {
				return path.Join("/", real)
			}
		case argv[0] == "which" || argv[0] == "command" && len(argv) > 2 && argv[1] == "-v" || argv[0] == "type":
			return r.a.lookPath(last)
		case argv[0] == "uname" && len(argv) == 1 || argv[0] == "uname" && last == "-s":
			return "Linux"
		case argv[0] == "uname" && last == "-m" && runtime.GOARCH == "amd64":
			return "x86_64"
		case argv[0] == "echo" && len(argv) > 1 && !strings.HasPrefix(argv[1], "-"):
			return strings.Join(argv[1:], " ")
		}
		return unknown
	}
}
