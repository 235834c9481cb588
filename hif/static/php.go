// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"strings"
)

// php is an installation of PHP: what was included, by path.
type php struct {
	seen map[string]bool
}

var (
	phpInclude = regexp.MustCompile(`\b(?:require|include)(?:_once)?\s*\(?\s*((?:__DIR__|dirname\(\s*__FILE__\s*\))\s*\.)?\s*['"]([^'"\n$]{1,512})['"]`)
	phpLoad    = regexp.MustCompile(`^\s*(?:zend_)?extension\s*=\s*"?([\w./-]+)"?`)
	phpDir     = regexp.MustCompile(`^\s*extension_dir\s*=\s*"?([\w./-]+)"?`)
)

func (a *analysis) php(i invocation) {
	base := path.Base(i.name)
	real, _ := a.resolve(i.name)
	sapi := "cli"
	if strings.Contains(base, "fpm") {
		sapi = "fpm"
	} else if strings.Contains(base, "cgi") {
		sapi = "cgi"
	}
	if a.localeName() == "" {
		a.locale(i.proc.object(), "C.UTF-8", []string{"LC_CTYPE"})
	}
	a.phpINI(i.proc, sapi, strings.TrimLeft(path.Base(real), "ph-fmcgi"))
	a.timeZone()
	args := i.argv[1:]
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		arg := args[0]
		args = args[1:]
		switch arg {
		case "-c", "-d", "-y", "--fpm-config", "-S", "-t", "-z", "-f", "--file":
			if len(args) == 0 {
				return
			}
			if arg == "-f" || arg == "--file" {
				a.phpFollow(args[0])
			} else if arg == "-c" || arg == "-y" || arg == "--fpm-config" {
				a.add(args[0], Config)
			}
			args = args[1:]
		case "-r":
			return
		}
	}
	if sapi == "fpm" {
		a.phpFPM()
		return
	}
	if len(args) > 0 {
		a.phpFollow(args[0])
		a.arguments(i, args[1:])
	}
}

// phpINI predicts php.ini, the files beside it, and the extensions that they load. Debian, the builds of docker-library
// and Alpine keep them in different places.
func (a *analysis) phpINI(p *process, sapi, version string) {
	dirs := append(a.glob("/etc/php/"+version+"*/"+sapi), a.glob("/usr/local/etc/php")...)
	if short := strings.ReplaceAll(version, ".", ""); short != "" {
		dirs = append(dirs, a.glob("/etc/php"+short)...)
	}
	if dir := a.env["PHP_INI_DIR"]; dir != "" {
		dirs = append(dirs, dir)
	}
	var extensionDirs []string
	for _, pattern := range []string{
		"/usr/lib/php/20*", "/usr/local/lib/php/extensions/no-debug-*zts-20*", "/usr/lib/php*/modules", "/usr/lib64/php/modules",
	} {
		extensionDirs = append(extensionDirs, a.glob(pattern)...)
	}
	for _, dir := range dirs {
		files := append([]string{dir + "/php.ini", dir + "/php-" + sapi + ".ini"}, a.glob(dir+"/conf.d/*.ini")...)
		for _, f := range files {
			if _, ok := a.add(f, Config); !ok {
				continue
			}
			for line := range strings.Lines(string(a.head(f, 1<<20))) {
				if m := phpDir.FindStringSubmatch(line); m != nil {
					extensionDirs = append([]string{m[1]}, extensionDirs...)
				}
				if m := phpLoad.FindStringSubmatch(line); m != nil {
					a.phpExtension(p, extensionDirs, m[1])
				}
			}
		}
		if strings.HasPrefix(dir, "/etc/php/") {
			a.add("/usr/share/zoneinfo/zone.tab", Startup) // Debian's takes the system's time zones
		}
	}
}

func (a *analysis) phpExtension(p *process, dirs []string, name string) {
	if strings.HasPrefix(name, "/") {
		a.dlopen(p, name, Startup)
		return
	}
	for _, dir := range dirs {
		for _, f := range []string{name, name + ".so", "php_" + name + ".so"} {
			if strings.HasSuffix(f, ".so") && a.dlopen(p, path.Join(dir, f), Startup) {
				return
			}
		}
	}
}

func (a *analysis) phpFPM() {
	for _, pattern := range []string{
		"/etc/php/*/fpm/php-fpm.conf", "/etc/php/*/fpm/pool.d/*.conf", "/usr/local/etc/php-fpm.conf", "/usr/local/etc/php-fpm.d/*.conf",
		"/etc/php*/php-fpm.conf", "/etc/php*/php-fpm.d/*.conf",
	} {
		for _, f := range a.glob(pattern) {
			a.add(f, Config)
		}
	}
	a.users("php-fpm")
}

// phpFollow predicts a script and what it includes by fixed names, and the files that Composer's loader always loads.
func (a *analysis) phpFollow(name string) {
	const deepest = 64
	if a.engines.php == nil {
		a.engines.php = map[string]*php{"": {seen: map[string]bool{}}}
	}
	seen := a.engines.php[""].seen
	queue := []string{name}
	for depth := 0; len(queue) > 0 && depth < deepest && !a.stopped(); depth++ {
		var next []string
		for _, f := range queue {
			real, ok := a.add(f, Script)
			if !ok || seen[real] || len(seen) > 10_000 {
				continue
			}
			seen[real] = true
			dir := path.Dir("/" + real)
			text := string(a.contents(f))
			if !a.spend(len(text)) {
				return
			}
			for _, m := range phpInclude.FindAllStringSubmatch(text, 2_000) {
				if strings.HasPrefix(m[2], "/") && m[1] == "" {
					next = append(next, m[2])
				} else {
					next = append(next, path.Join(dir, m[2]))
				}
			}
			if path.Base(real) == "autoload.php" {
				for _, f := range []string{
					"ClassLoader.php", "autoload_real.php", "autoload_static.php", "platform_check.php", "autoload_files.php", "include_paths.php", "InstalledVersions.php",
				} {
					next = append(next, path.Join(dir, "composer", f))
				}
			}
		}
		queue = next
	}
}
