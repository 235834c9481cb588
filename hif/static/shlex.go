// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"strings"
)

// A shell script is read for the simple commands in it, not for what it means: enough to see which programs and files it
// may use. What the reader does not understand it passes over.

// shWord is a word of a command, in parts that are either literal or the name of a variable.
type shWord struct {
	parts  []shPart
	quoted bool
}

type shPart struct {
	text     string // literal, or the variable's name
	variable bool
	fallback string // of ${NAME:-fallback}
	op, arg  string // of ${NAME#arg}, ${NAME%arg}, ${NAME:+arg}
	command  string // of $(command)
}

// shToken is a word, or an operator.
type shToken struct {
	word shWord
	op   string // ";", "&&", "|", "(", ")", ";;", "<", ">", …; "": a word
}

type shLexer struct {
	s       string
	at      int
	nested  []string // texts of command substitutions
	heredoc []string // delimiters whose documents begin at the next line
	tokens  int
}

const (
	maxShTokens = 200_000
	maxShNested = 2_000
)

// next gives the next token. ok is false at the end.
func (l *shLexer) next() (t shToken, ok bool) {
	if l.tokens++; l.tokens > maxShTokens {
		return t, false
	}
	for l.at < len(l.s) {
		switch c := l.s[l.at]; {
		case c == ' ' || c == '\t' || c == '\r':
			l.at++
		case c == '\\' && l.at+1 < len(l.s) && l.s[l.at+1] == '\n':
			l.at += 2
		case c == '#':
			l.skipLine()
		case c == '\n':
			l.at++
			l.skipDocuments()
			return shToken{op: ";"}, true
		case strings.IndexByte(";&|()<>", c) >= 0:
			return l.operator(), true
		default:
			return shToken{word: l.word()}, true
		}
	}
	return t, false
}

func (l *shLexer) skipLine() {
	if n := strings.IndexByte(l.s[l.at:], '\n'); n >= 0 {
		l.at += n
	} else {
		l.at = len(l.s)
	}
}

func (l *shLexer) operator() shToken {
	for _, op := range []string{";;&", "<<<", "<<-", ";;", ";&", "&&", "||", "|&", "<<", ">>", "<&", ">&", "<>", ">|", "&>"} {
		if strings.HasPrefix(l.s[l.at:], op) {
			l.at += len(op)
			if op == "<<" || op == "<<-" {
				for l.at < len(l.s) && l.s[l.at] == ' ' {
					l.at++
				}
				var b strings.Builder
				for _, p := range l.word().parts {
					b.WriteString(p.text)
				}
				const maxDocuments = 16
				if b.Len() > 0 && len(l.heredoc) < maxDocuments {
					l.heredoc = append(l.heredoc, b.String())
				}
				return shToken{op: "<<"}
			}
			return shToken{op: op}
		}
	}
	l.at++
	return shToken{op: l.s[l.at-1 : l.at]}
}

// skipDocuments passes over here-documents.
func (l *shLexer) skipDocuments() {
	for _, end := range l.heredoc {
		for l.at < len(l.s) {
			line := l.s[l.at:]
			if n := strings.IndexByte(line, '\n'); n >= 0 {
				line = line[:n]
				l.at += n + 1
			} else {
				l.at = len(l.s)
			}
			if strings.TrimLeft(line, "\t") == end {
				break
			}
		}
	}
	l.heredoc = nil
}

func (l *shLexer) word() shWord {
	var w shWord
	var b strings.Builder
	flush := func() {
		if b.Len() > 0 {
			w.parts = append(w.parts, shPart{text: b.String()})
			b.Reset()
		}
	}
	double := false
	for l.at < len(l.s) {
		c := l.s[l.at]
		switch {
		case c == '\\':
			if l.at+1 < len(l.s) && l.s[l.at+1] != '\n' {
				b.WriteByte(l.s[l.at+1])
			}
			l.at += 2
		case c == '"':
			double, w.quoted = !double, true
			l.at++
		case c == '\'' && !double:
			w.quoted = true
			end := strings.IndexByte(l.s[l.at+1:], '\'')
			if end < 0 {
				end = len(l.s) - l.at - 1
			}
			b.WriteString(l.s[l.at+1 : l.at+1+end])
			l.at += end + 2
		case c == '$':
			flush()
			w.parts = append(w.parts, l.dollar())
		case c == '`':
			flush()
			w.parts = append(w.parts, shPart{variable: true, command: l.backquoted()})
		case !double && strings.IndexByte(" \t\r\n;&|()<>", c) >= 0:
			flush()
			return w
		default:
			b.WriteByte(c)
			l.at++
		}
		l.at = min(l.at, len(l.s))
	}
	flush()
	return w
}

// backquoted reads an old command substitution, in which a backslash keeps backquotes.
func (l *shLexer) backquoted() string {
	var b strings.Builder
	for l.at++; l.at < len(l.s) && l.s[l.at] != '`'; l.at++ {
		if l.s[l.at] == '\\' && l.at+1 < len(l.s) && strings.IndexByte("`$\\", l.s[l.at+1]) >= 0 {
			l.at++
		}
		b.WriteByte(l.s[l.at])
	}
	l.at++
	l.nest(b.String())
	return b.String()
}

func (l *shLexer) nest(text string) {
	if len(l.nested) < maxShNested {
		l.nested = append(l.nested, text)
	}
}

// dollar reads what follows a dollar sign. A variable without a name has a value that cannot be known.
func (l *shLexer) dollar() shPart {
	l.at++
	if l.at >= len(l.s) {
		return shPart{text: "$"}
	}
	switch c := l.s[l.at]; {
	case c == '(':
		inside := l.balanced('(', ')')
		if strings.HasPrefix(inside, "(") {
			return shPart{variable: true} // arithmetic
		}
		l.nest(inside)
		return shPart{variable: true, command: inside}
	case c == '{':
		inside := l.balanced('{', '}')
		n := 0
		for n < len(inside) && n < 256 && isName(inside[:n+1]) {
			n++
		}
		if n == 0 && inside != "" && strings.IndexByte("@*#?0123456789", inside[0]) >= 0 {
			n = 1
		}
		p := shPart{text: inside[:n], variable: true}
		rest := inside[n:]
		for _, op := range []string{":-", "-", ":=", "="} {
			if f, ok := strings.CutPrefix(rest, op); ok {
				p.fallback, rest = strings.Trim(f, "'\""), ""
				break
			}
		}
		if strings.Contains(inside, "$(") {
			l.nest(inside[strings.Index(inside, "$(")+1:])
		}
		for _, op := range []string{":+", "+", "##", "#", "%%", "%"} {
			if arg, ok := strings.CutPrefix(rest, op); ok && p.text != "" && !strings.ContainsAny(arg, "$`*?[") {
				p.op, p.arg, rest = op, strings.Trim(arg, "'\""), ""
				break
			}
		}
		if rest != "" || strings.ContainsAny(p.fallback, "$`") {
			return shPart{variable: true} // changed in a way that is not followed
		}
		return p
	case strings.IndexByte("@*#?$!-0123456789", c) >= 0:
		l.at++
		return shPart{text: string(c), variable: true}
	default:
		n := l.at
		for n < len(l.s) && isName(l.s[l.at:n+1]) {
			n++
			if n-l.at > 256 {
				break
			}
		}
		name := l.s[l.at:n]
		l.at = n
		if name == "" {
			return shPart{text: "$"}
		}
		return shPart{text: name, variable: true}
	}
}

// balanced returns what is between brackets, of which the opening one is next. Quotes are minded roughly.
func (l *shLexer) balanced(open, shut byte) string {
	start, depth := l.at+1, 0
	var quote byte
	for ; l.at < len(l.s); l.at++ {
		switch c := l.s[l.at]; {
		case c == '\\':
			l.at++
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'':
			quote = c
		case c == open:
			depth++
		case c == shut:
			if depth--; depth == 0 {
				l.at++
				return l.s[start : l.at-1]
			}
		}
	}
	l.at = len(l.s)
	return l.s[min(start, len(l.s)):]
}
