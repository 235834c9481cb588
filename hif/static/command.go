// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"strings"
)

// engines is what is kept of language runtimes between scripts.
type engines struct {
	python map[string]*python
	node   map[string]bool
	ruby   map[string]*ruby
	perl   map[string]*perl
	php    map[string]*php
}

// invocation is a program that is started: its file, its arguments with its name first, and how deep programs started it.
type invocation struct {
	name  string // as a path of the image
	argv  []string
	depth int
	proc  *process // nil: static
}

// The programs whose arguments, files and start-up sets are known, by name without version.
var handlers map[string]func(a *analysis, i invocation)

func init() { // would be an initialization cycle
	handlers = map[string]func(*analysis, invocation){
		"sh": (*analysis).shell, "dash": (*analysis).shell, "bash": (*analysis).shell, "ash": (*analysis).shell, "ksh": (*analysis).shell,
		"python": (*analysis).python, "pypy": (*analysis).python,
		"node": (*analysis).node, "nodejs": (*analysis).node,
		"java": (*analysis).java,
		"ruby": (*analysis).ruby,
		"perl": (*analysis).perl,
		"php":  (*analysis).php, "php-fpm": (*analysis).php, "php-cgi": (*analysis).php,
		"nginx": (*analysis).nginx, "apache2": (*analysis).apache, "httpd": (*analysis).apache,
		"postgres": (*analysis).postgres, "initdb": (*analysis).initdb, "mysqld": (*analysis).mysql, "mariadbd": (*analysis).mysql,
		"redis-server": (*analysis).redis, "valkey-server": (*analysis).redis,
	}
	for name := range wrappers {
		handlers[name] = (*analysis).wrapper
	}
}

// baseName is a program's name without its version: python3.11 is python, php-fpm8.2 is php-fpm.
func baseName(name string) string {
	base := path.Base(name)
	if short := strings.TrimRight(base, "0123456789."); short != "" {
		base = strings.TrimRight(short, "-")
	}
	return base
}

// lookPath finds a program as execvp(3) does.
func (a *analysis) lookPath(name string) string {
	if name == "" {
		return ""
	}
	if strings.Contains(name, "/") {
		if a.isFile(name) {
			return name
		}
		return ""
	}
	const maxDirs = 64
	for i, dir := range strings.Split(a.env["PATH"], ":") {
		if i == maxDirs {
			break
		}
		if f := path.Join("/", dir, name); a.isFile(f) {
			return f
		}
	}
	return ""
}

// exec follows a command line: the program, what it is linked with, and what is known of its arguments.
func (a *analysis) exec(argv []string, depth int) {
	if len(argv) == 0 || depth > a.options.MaxDepth || a.stopped() {
		return
	}
	const maxArgs, maxCommands = 4096, 2000
	argv = argv[:min(len(argv), maxArgs)]
	key := strings.Join(argv, "\x00")
	if a.running[key] || len(a.running) >= maxCommands {
		return
	}
	a.running[key] = true
	if name := a.lookPath(argv[0]); name != "" {
		a.program(name, argv, Command, depth)
	}
}

// program follows a program whose file is known.
func (a *analysis) program(name string, argv []string, why Reason, depth int) {
	if _, ok := a.add(name, why); !ok || depth > a.options.MaxDepth {
		return
	}
	if a.object(name) != nil {
		a.binary(name, argv, depth)
		return
	}
	const maxLine = 256 // BINPRM_BUF_SIZE of the kernel
	head := string(a.head(name, maxLine))
	if line, ok := strings.CutPrefix(head, "#!"); ok {
		line, _, _ = strings.Cut(line, "\n")
		interp, arg, has := strings.Cut(strings.TrimSpace(line), " ")
		if tab, rest, ok := strings.Cut(interp, "\t"); ok {
			interp, arg, has = tab, rest+" "+arg, true
		}
		next := []string{interp}
		if arg = strings.TrimSpace(arg); has && arg != "" {
			next = append(next, arg)
		}
		next = append(next, name)
		if len(argv) > 1 {
			next = append(next, argv[1:]...)
		}
		a.program(interp, next, Interpreter, depth+1)
		a.starter(name, argv, depth)
		return
	}
	if isText(head) {
		// execvp(3) and shells hand a text without #! to the shell.
		a.program("/bin/sh", append([]string{"/bin/sh", name}, argv[min(1, len(argv)):]...), Interpreter, depth+1)
	}
}

// starter follows what well-known scripts start, which their text hides behind variables.
func (a *analysis) starter(name string, argv []string, depth int) {
	switch path.Base(name) {
	case "apache2ctl", "apachectl":
		a.exec([]string{"apache2"}, depth+1)
		a.exec([]string{"httpd"}, depth+1)
	case "supervisord":
		a.supervisor(invocation{name: name, argv: argv, depth: depth})
	}
}

func isText(s string) bool {
	return s != "" && !strings.ContainsRune(s, 0)
}

// binary follows an ELF file.
func (a *analysis) binary(name string, argv []string, depth int) {
	i := invocation{name: name, argv: argv, depth: depth, proc: a.start(name)}
	if i.proc == nil {
		a.mentioned(name)
	}
	real, _ := a.resolve(name)
	// By the name it was called by, else by that of its file: alternatives and links like python3 both occur.
	for _, base := range []string{baseName(argv[0]), path.Base(argv[0]), baseName(name), baseName(real)} {
		if h := handlers[base]; h != nil {
			a.users(base)
			h(a, i)
			return
		}
	}
	if path.Base(real) == "busybox" && len(argv) > 1 && handlers[argv[1]] != nil {
		i.argv = argv[1:]
		handlers[argv[1]](a, i)
		return
	}
	a.users(baseName(argv[0]))
	a.wellKnown(baseName(real))
	a.arguments(i, argv[1:])
}

// arguments predicts files that are named on a command line, also in options as --config=FILE.
func (a *analysis) arguments(_ invocation, args []string) {
	for _, arg := range args {
		if _, value, ok := strings.Cut(arg, "="); ok && strings.HasPrefix(arg, "-") {
			arg = value
		}
		if strings.HasPrefix(arg, "-") || !strings.ContainsAny(arg, "/.") {
			continue
		}
		a.add(arg, Argument)
	}
}

// wrapping tells how a program that starts another one takes its arguments.
type wrapping struct {
	valued string // options that take the next argument, between spaces
	skip   int    // arguments before the command
}

var wrappers = map[string]wrapping{
	"env": {valued: " -u --unset -C --chdir "}, "tini": {valued: " -p -e "}, "docker-init": {}, "dumb-init": {valued: " --rewrite -r "},
	"catatonit": {}, "gosu": {skip: 1}, "su-exec": {skip: 1}, "nohup": {}, "setsid": {}, "stdbuf": {valued: " -i -o -e "},
	"nice": {valued: " -n "}, "ionice": {valued: " -c -n "}, "timeout": {valued: " -k -s ", skip: 1}, "taskset": {skip: 1},
	"setpriv": {valued: " --reuid --regid --groups --inh-caps --ambient-caps --bounding-set --securebits "},
	"sudo":    {valued: " -u -g -E -H "}, "chroot": {skip: 1}, "numactl": {valued: " -i -m -N -C "}, "time": {valued: " -f -o "},
	"su": {}, "runuser": {valued: " -u "}, "xargs": {valued: " -n -I -L -P -d -s "}, "start-stop-daemon": {}, "find": {}, "authbind": {},
}

// wrapper follows the command that a program starts.
func (a *analysis) wrapper(i invocation) {
	w := wrappers[baseName(i.argv[0])]
	args := i.argv[1:]
	switch baseName(i.argv[0]) {
	case "find":
		a.findExec(args, i.depth)
		return
	case "start-stop-daemon":
		a.startDaemon(args, i.depth)
		return
	case "su", "runuser":
		for k, arg := range args {
			if (arg == "-c" || arg == "--command") && k+1 < len(args) {
				a.exec([]string{"/bin/sh", "-c", args[k+1]}, i.depth+1)
				return
			}
		}
		if baseName(i.argv[0]) == "su" {
			return // a shell to type into
		}
	}
	for len(args) > 0 {
		arg := args[0]
		name, value, assigned := strings.Cut(arg, "=")
		switch {
		case arg == "--":
			args = args[1:]
			a.exec(args[min(w.skip, len(args)):], i.depth+1)
			return
		case arg == "-S" || arg == "--split-string" || strings.HasPrefix(arg, "-S") && baseName(i.argv[0]) == "env":
			// env -S: one argument out of #! holds all.
			line := strings.TrimPrefix(arg, "-S")
			if line == "" || strings.HasPrefix(line, "-") {
				if args = args[1:]; len(args) == 0 {
					return
				}
				line = args[0]
			}
			args = append(strings.Fields(line), args[1:]...)
			continue
		case strings.HasPrefix(arg, "-"):
			if strings.Contains(w.valued, " "+arg+" ") {
				args = args[1:]
			}
		case assigned && isName(name) && w.skip == 0:
			a.env[name] = value
		default:
			a.exec(args[min(w.skip, len(args)):], i.depth+1)
			return
		}
		args = args[min(1, len(args)):]
	}
}

func (a *analysis) findExec(args []string, depth int) {
	for k, arg := range args {
		if arg == "-user" || arg == "-group" {
			a.users("chown")
		}
		if arg == "-exec" || arg == "-execdir" || arg == "-ok" {
			command := args[k+1:]
			for n, c := range command {
				if c == ";" || c == "+" || c == "{}" {
					command = command[:n]
					break
				}
			}
			a.exec(command, depth+1)
		}
	}
}

func (a *analysis) startDaemon(args []string, depth int) {
	var command []string
	for k, arg := range args {
		if (arg == "--exec" || arg == "-x" || arg == "--startas" || arg == "-a") && k+1 < len(args) {
			command = []string{args[k+1]}
		}
		if arg == "--" && command != nil {
			command = append(command, args[k+1:]...)
			break
		}
	}
	a.exec(command, depth+1)
}

func isName(s string) bool {
	for k, r := range s {
		if r != '_' && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (k == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != ""
}
