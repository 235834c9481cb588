// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

var pyEntry = regexp.MustCompile(`load_entry_point\(\s*['"]([\w.-]+)[^'"]*['"]\s*,\s*['"](\w+)['"]\s*,\s*['"]([\w.-]+)['"]`)

// entryPoint follows a command that an installer made: it looks its function up in the package's description.
func (p *python) entryPoint(text string) {
	m := pyEntry.FindStringSubmatch(text)
	if m == nil {
		return
	}
	for _, dir := range p.paths {
		for _, info := range p.a.glob(dir + "/" + m[1] + "-*-info") {
			for _, f := range []string{"PKG-INFO", "METADATA"} {
				p.a.add(info+"/"+f, Module)
			}
			p.a.add(info+"/entry_points.txt", Module)
			group := ""
			for line := range strings.Lines(string(p.a.head(info+"/entry_points.txt", 64<<10))) {
				line = strings.TrimSpace(line)
				name, target, ok := strings.Cut(line, "=")
				if strings.HasPrefix(line, "[") {
					group = strings.Trim(line, "[]")
				} else if ok && group == m[2] && strings.TrimSpace(name) == m[3] {
					module, _, _ := strings.Cut(target, ":")
					p.load(strings.TrimSpace(module), Module)
				}
			}
		}
	}
}

// entryPoints predicts what is read to find plugins.
func (p *python) entryPoints() {
	for _, dir := range p.paths {
		if base := path.Base(dir); base == "site-packages" || base == "dist-packages" {
			for _, f := range p.a.glob(dir + "/*-info/entry_points.txt") {
				p.a.add(f, Module)
			}
		}
	}
}

// arguments follows modules named to servers: "package.module:application", and scripts and settings of frameworks.
func (p *python) arguments(args []string) {
	for _, v := range []string{"DJANGO_SETTINGS_MODULE", "FLASK_APP", "UVICORN_APP"} {
		if m := p.a.env[v]; m != "" {
			args = append(args, m+":")
		}
	}
	p.a.arguments(invocation{}, args)
	for _, arg := range args {
		name, _, isApp := strings.Cut(arg, ":")
		if strings.HasSuffix(name, ".py") && p.a.isFile(name) {
			real, _ := p.a.resolve(name)
			if len(p.paths) < 100 {
				p.paths = append(p.paths, "/"+path.Dir(real))
			}
			p.load(strings.TrimSuffix(path.Base(name), ".py"), Script)
		} else if isApp && !strings.ContainsAny(name, "/-") && name != "" {
			if !slices.Contains(p.paths, p.a.cwd) && len(p.paths) < 100 {
				p.paths = append([]string{p.a.cwd}, p.paths...) // as such servers do
			}
			p.load(name, Script)
		}
	}
}
