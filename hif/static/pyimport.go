// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"regexp"
	"strconv"
	"strings"
)

// pyImport is one import of a module.
type pyImport struct {
	module string   // dotted; "" for "from . import x"
	level  int      // leading dots
	names  []string // of "from … import"
	try    int      // the try block it is in, 0: none
	unless int      // it stands in the except clause of this try block: wanted if an import there failed
	inner  bool     // in a function
	lazy   bool     // in the function __getattr__ of a module
}

// pyBlock is an indented block.
type pyBlock struct {
	indent int
	kind   byte // 'f' function, 's' skipped, 't' try, 'e' except of try, 'o' other
	try    int
}

var (
	pyImportLine = regexp.MustCompile(`^import\s+(.+)$`)
	pyFromLine   = regexp.MustCompile(`^from\s+(\.*)\s*([\w.]*)\s+import\s+(.+)$`)
	pyVersion    = regexp.MustCompile(`sys\.version_info\s*(?:\[:2\]\s*)?(<=?|>=?)\s*\(3,\s*(\d+)`)
	pyForeign    = regexp.MustCompile(`==\s*['"](win32|nt|cygwin|darwin|java|cli)['"]|startswith\(['"](win|darwin|java|aix)|TYPE_CHECKING|\b_mswindows\b|\bWIN\b|\bMS_WINDOWS\b`)
	pyDynamic    = regexp.MustCompile(`\b(?:__import__|import_module)\(\s*['"]([\w.]+)['"]`)
)

const maxPyImports = 5_000

// pyImports reads the import statements of a Python text, by its lines and their indentation. Blocks for other systems,
// for type checkers and, unless main is set, for a main program are left out. minor is that of Python 3.
func pyImports(text string, main bool, minor int) []pyImport {
	var found []pyImport
	var blocks []pyBlock
	tries := 0
	lastTry := map[int]int{} // by indentation
	for line := range pyLines(text) {
		body := strings.TrimLeft(line, " \t")
		indent := len(line) - len(body)
		for len(blocks) > 0 && indent <= blocks[len(blocks)-1].indent {
			blocks = blocks[:len(blocks)-1]
		}
		at := pyImport{}
		skipped := false
		for _, b := range blocks {
			switch b.kind {
			case 's':
				skipped = true
			case 'f':
				at.inner = true
				at.lazy = at.lazy || b.try < 0
			case 't':
				at.try = b.try
			case 'e':
				at.unless = b.try
			}
		}
		if skipped {
			continue
		}
		head, rest := body, ""
		if n := strings.Index(body, ":"); n >= 0 {
			head, rest = body[:n], strings.TrimSpace(body[n+1:])
		}
		word, _, _ := strings.Cut(strings.TrimRight(head, "("), " ")
		block := pyBlock{indent: indent, kind: 'o'}
		switch word {
		case "def", "async":
			block.kind = 'f'
			if strings.HasPrefix(head, "def __getattr__(") {
				block.try = -1
			}
		case "try":
			tries++
			block.kind, block.try = 't', tries
			lastTry[indent] = tries
		case "except":
			block.kind = 'o'
			if head == "except" || strings.Contains(head, "ImportError") || strings.Contains(head, "ModuleNotFoundError") || strings.Contains(head, "Exception") {
				block.kind, block.try = 'e', lastTry[indent]
			}
		case "if", "elif":
			if pyForeign.MatchString(head) && !strings.Contains(head, " not ") || !main && strings.Contains(head, "__name__") || !pyVersionHolds(body, minor) {
				block.kind = 's'
			}
		case "else", "finally", "class", "with", "for", "while":
		default:
			if len(found) < maxPyImports {
				found = append(found, pyStatement(body, at)...)
			}
			continue
		}
		if rest == "" || strings.HasPrefix(rest, "#") || word == "if" || word == "def" || word == "class" {
			if len(blocks) < 100 {
				blocks = append(blocks, block)
			}
		}
		if rest != "" && block.kind != 's' && block.kind != 'f' {
			if block.kind == 't' {
				at.try = block.try
			}
			found = append(found, pyStatement(rest, at)...)
		}
	}
	return found
}

func pyVersionHolds(condition string, minor int) bool {
	m := pyVersion.FindStringSubmatch(condition)
	if m == nil {
		return true
	}
	n, err := strconv.Atoi(m[2])
	if err != nil {
		return true
	}
	switch m[1] {
	case "<":
		return minor < n
	case "<=":
		return minor <= n
	case ">":
		return minor > n
	}
	return minor >= n
}

// pyStatement reads a line without indentation.
func pyStatement(s string, at pyImport) []pyImport {
	var found []pyImport
	for part := range strings.SplitSeq(s, ";") {
		part = strings.TrimSpace(part)
		if m := pyFromLine.FindStringSubmatch(part); m != nil {
			i := at
			i.level, i.module = len(m[1]), m[2]
			for name := range strings.SplitSeq(strings.Trim(m[3], "() "), ",") {
				if f := strings.Fields(name); len(f) > 0 {
					i.names = append(i.names, f[0])
				}
			}
			found = append(found, i)
		} else if m := pyImportLine.FindStringSubmatch(part); m != nil {
			for name := range strings.SplitSeq(m[1], ",") {
				if f := strings.Fields(name); len(f) > 0 {
					i := at
					i.module = f[0]
					found = append(found, i)
				}
			}
		} else if m := pyDynamic.FindStringSubmatch(part); m != nil {
			i := at
			i.module = m[1]
			found = append(found, i)
		}
	}
	return found
}

// pyLines gives the logical lines: without comments and long strings, those in brackets or with a backslash joined.
func pyLines(text string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		const longest = 32 << 10
		joined, depth, long := "", 0, ""
		for line := range strings.Lines(text) {
			line = strings.TrimRight(line, "\r\n")
			var b strings.Builder
			quote := byte(0)
			continued := false
			for i := 0; i < len(line); i++ {
				c := line[i]
				switch {
				case long != "":
					if strings.HasPrefix(line[i:], long) {
						i += 2
						long = ""
						b.WriteString(`""`)
					} else if c == '\\' {
						i++
					}
					continue
				case quote != 0:
					if c == '\\' && i+1 < len(line) {
						b.WriteByte(c)
						i++
						c = line[i]
					} else if c == quote {
						quote = 0
					}
				case strings.HasPrefix(line[i:], `"""`) || strings.HasPrefix(line[i:], "'''"):
					long = line[i : i+3]
					i += 2
					continue
				case c == '"' || c == '\'':
					quote = c
				case c == '#':
					i = len(line)
					continue
				case c == '(' || c == '[' || c == '{':
					depth++
				case c == ')' || c == ']' || c == '}':
					depth = max(0, depth-1)
				case c == '\\' && i == len(line)-1:
					continued = true
					continue
				}
				b.WriteByte(c)
			}
			if joined == "" {
				joined = b.String()
			} else if len(joined) < longest {
				joined += " " + strings.TrimLeft(b.String(), " \t")
			}
			if long != "" || depth > 0 || continued {
				continue
			}
			if strings.TrimSpace(joined) != "" && !yield(strings.TrimRight(joined, " \t")) {
				return
			}
			joined = ""
		}
		if strings.TrimSpace(joined) != "" {
			yield(joined)
		}
	}
}
