// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"strconv"
	"strings"
)

// expand gives a word's value. ok is false if only a run would tell all of it: then unknown stands for the rest.
func (r *shRun) expand(w shWord) (string, bool) {
	const longest = 64 << 10
	var b strings.Builder
	for _, p := range w.parts {
		v := p.text
		if p.variable {
			v = r.value(p)
		}
		if b.Len()+len(v) > longest {
			v = unknown
		}
		b.WriteString(v)
	}
	s := b.String()
	if strings.HasPrefix(s, "~/") && !w.quoted {
		s = r.a.env["HOME"] + s[1:]
	}
	return s, !strings.Contains(s, unknown)
}

func (r *shRun) value(p shPart) string {
	v := r.plain(p)
	switch {
	case v == "":
		v = p.fallback
	case v == unknown && p.fallback != "":
		v = p.fallback
	}
	switch p.op {
	case ":+", "+":
		if v != "" {
			v = p.arg
		}
	case "#", "##":
		v = strings.TrimPrefix(v, p.arg)
	case "%", "%%":
		v = strings.TrimSuffix(v, p.arg)
	}
	return v
}

func (r *shRun) plain(p shPart) string {
	if p.command != "" {
		return r.substitute(p.command)
	}
	switch {
	case p.text == "" || strings.Contains("?$!-", p.text):
		return unknown
	case p.text == "#":
		return strconv.Itoa(max(0, len(r.args)-1))
	case p.text == "@" || p.text == "*":
		return strings.Join(r.args[min(1, len(r.args)):], " ")
	case p.text[0] >= '0' && p.text[0] <= '9':
		if n := int(p.text[0] - '0'); len(p.text) == 1 && n < len(r.args) {
			return r.args[n]
		}
		return ""
	}
	if v, ok := r.vars[p.text]; ok {
		return v
	}
	return r.a.env[p.text]
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
			out = append(out, s)
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
