// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"strings"
)

// settings is how a server's configuration names other files.
type settings struct {
	include []string // directives whose values are files or patterns to read on
	module  []string // directives whose last value is a library
	base    string   // what relative names are relative to
	whole   bool     // an included directory stands for all files in it
}

var envReference = regexp.MustCompile(`\$\{(\w+)\}`)

// config predicts a configuration file with the files it includes, loads and names by their whole path.
func (a *analysis) config(p *process, name string, s settings) {
	a.configFile(p, name, s, 0)
}

func (a *analysis) configFile(p *process, name string, s settings, depth int) {
	const deepest, most = 8, 4 << 20
	real, ok := a.add(name, Config)
	key := "config\x00" + real
	if !ok || depth > deepest || a.running[key] || a.stopped() {
		return
	}
	a.running[key] = true
	for line := range strings.Lines(string(a.head(name, most))) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' || len(line) > 4096 {
			continue
		}
		line = envReference.ReplaceAllStringFunc(line, func(m string) string { return a.env[m[2:len(m)-1]] })
		words := strings.FieldsFunc(line, func(r rune) bool {
			return r == ' ' || r == '\t' || r == ';' || r == '=' || r == '"' || r == '\'' || r == '{' || r == '}'
		})
		for k, w := range words {
			switch {
			case k > 0 && isOneOf(words[0], s.include):
				a.configInclude(p, w, s, depth)
			case k > 0 && k == len(words)-1 && isOneOf(words[0], s.module):
				a.dlopen(p, s.join(w), Module)
			case strings.HasPrefix(w, "/") && !strings.ContainsAny(w, "*?["):
				a.add(w, Config)
			case k > 0 && k == len(words)-1 && s.base != "" && strings.Contains(w, "/") && !strings.ContainsAny(w, ":*$"):
				a.add(s.join(w), Config)
			}
		}
	}
}

func (s settings) join(name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	return path.Join("/", s.base, name)
}

func (a *analysis) configInclude(p *process, pattern string, s settings, depth int) {
	pattern = s.join(pattern)
	if s.whole && a.isDir(pattern) {
		pattern += "/*"
	}
	for _, f := range a.glob(pattern) {
		a.configFile(p, f, s, depth+1)
	}
}

func isOneOf(word string, list []string) bool {
	for _, l := range list {
		if strings.EqualFold(word, l) {
			return true
		}
	}
	return false
}

// option gives the value of an option on a command line: "-c FILE", "-cFILE", "--config=FILE", "--config FILE".
func option(args []string, names ...string) string {
	for k, arg := range args {
		for _, name := range names {
			if arg == name && k+1 < len(args) {
				return args[k+1]
			}
			if v, ok := strings.CutPrefix(arg, name+"="); ok && strings.HasPrefix(name, "--") {
				return v
			}
			if v, ok := strings.CutPrefix(arg, name); ok && v != "" && !strings.HasPrefix(name, "--") {
				return v
			}
		}
	}
	return ""
}

func (a *analysis) firstFile(names ...string) string {
	for _, n := range names {
		if n != "" && a.isFile(n) {
			return n
		}
	}
	return ""
}

func (a *analysis) nginx(i invocation) {
	name := a.firstFile(option(i.argv, "-c"), "/etc/nginx/nginx.conf", "/usr/local/nginx/conf/nginx.conf", "/usr/local/openresty/nginx/conf/nginx.conf")
	if name == "" {
		return
	}
	base := path.Dir(name)
	prefix := "/usr/share/nginx"
	if !a.isDir(prefix) {
		prefix = "/etc/nginx"
	}
	a.config(i.proc, name, settings{include: []string{"include"}, base: base})
	// Names of modules are relative to the prefix, those of files to the directory of the configuration.
	a.nginxModules(i.proc, prefix)
	a.documents("root", "index", "index.html")
}

// nginxModules loads what load_module names in the files read so far.
func (a *analysis) nginxModules(p *process, prefix string) {
	for _, f := range a.configs() {
		for line := range strings.Lines(string(a.head("/"+f.Path, 1<<20))) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "load_module"); ok {
				a.dlopen(p, settings{base: prefix}.join(strings.Trim(v, " \t;\"'\n")), Module)
			}
		}
	}
}

func (a *analysis) configs() []File {
	var found []File
	for _, f := range a.files {
		if f.Reason == Config {
			found = append(found, f)
		}
	}
	return found
}

// documents predicts the page that a check of readiness asks for: the index of each root.
func (a *analysis) documents(root, index string, names ...string) {
	var roots []string
	for _, f := range a.configs() {
		for line := range strings.Lines(string(a.head("/"+f.Path, 1<<20))) {
			words := strings.Fields(strings.Trim(strings.TrimSpace(line), ";"))
			if len(words) < 2 {
				continue
			}
			if strings.EqualFold(words[0], root) {
				roots = append(roots, strings.Trim(words[1], `"'`))
			} else if strings.EqualFold(words[0], index) {
				names = append(words[1:len(words):len(words)], names...)
			}
		}
	}
	const most = 32
	for k, r := range roots {
		if k == most {
			break
		}
		for _, n := range names[:min(len(names), most)] {
			if _, ok := a.add(path.Join("/", r, n), Argument); ok {
				break
			}
		}
	}
}

func (a *analysis) apache(i invocation) {
	root := "/etc/apache2"
	name := a.firstFile(option(i.argv, "-f"), "/etc/apache2/apache2.conf", "/usr/local/apache2/conf/httpd.conf", "/etc/httpd/conf/httpd.conf", "/etc/apache2/httpd.conf")
	if name == "" {
		return
	}
	switch {
	case strings.HasPrefix(name, "/usr/local/apache2/"):
		root = "/usr/local/apache2"
	case strings.HasPrefix(name, "/etc/httpd/"):
		root = "/etc/httpd"
	}
	if a.env["APACHE_LOG_DIR"] == "" {
		a.env["APACHE_LOG_DIR"] = "/var/log/apache2" // of envvars, which its script reads
	}
	a.config(i.proc, name, settings{include: []string{"Include", "IncludeOptional"}, module: []string{"LoadModule", "LoadFile"}, base: root, whole: true})
	a.documents("DocumentRoot", "DirectoryIndex", "index.html")
	a.dlopen(i.proc, "libgcc_s.so.1", Library) // by libc, when a thread ends
	a.hostName()
}

// hostName predicts what getaddrinfo(3) reads: a server looks its own name up.
func (a *analysis) hostName() {
	for _, f := range []string{"/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"} {
		a.add(f, System)
	}
}

func (a *analysis) redis(i invocation) {
	a.arguments(i, i.argv[1:])
	if len(i.argv) > 1 && a.isFile(i.argv[1]) {
		a.config(i.proc, i.argv[1], settings{include: []string{"include"}, module: []string{"loadmodule"}})
	}
}

// postgresShare is where a server's own files are, beside its programs.
func (a *analysis) postgresShare(i invocation) string {
	real, _ := a.resolve(i.name)
	home := path.Dir(path.Dir("/" + real)) // /usr/lib/postgresql/15
	for _, d := range []string{"/usr/share/postgresql/" + path.Base(home), home + "/share/postgresql", home + "/share", "/usr/share/postgresql"} {
		if a.isDir(d + "/timezonesets") {
			return d
		}
	}
	return ""
}

func (a *analysis) postgres(i invocation) {
	share := a.postgresShare(i)
	a.add(share+"/timezonesets/Default", Startup)
	a.timeZone()
	a.hostName()
	a.arguments(i, i.argv[1:])
	data := option(i.argv, "-D", "--pgdata")
	if data == "" {
		data = a.env["PGDATA"]
	}
	if conf := a.firstFile(option(i.argv, "--config-file"), data+"/postgresql.conf"); conf != "" {
		a.config(i.proc, conf, settings{include: []string{"include", "include_if_exists", "include_dir"}, whole: true, base: path.Dir(conf)})
	}
	if data != "" {
		for _, f := range []string{"pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf", "PG_VERSION"} {
			a.add(path.Join(data, f), Config)
		}
	}
}

// initdb makes a cluster out of samples, with the server in single mode.
func (a *analysis) initdb(i invocation) {
	share := a.postgresShare(i)
	if share == "" {
		return
	}
	for _, f := range []string{
		"postgres.bki", "pg_hba.conf.sample", "pg_ident.conf.sample", "postgresql.conf.sample", "snowball_create.sql", "information_schema.sql",
		"sql_features.txt", "system_constraints.sql", "system_functions.sql", "system_views.sql", "extension/plpgsql.control", "extension/plpgsql--1.0.sql",
	} {
		a.add(path.Join(share, f), Startup)
	}
	real, _ := a.resolve(i.name)
	server := path.Join("/", path.Dir(real), "postgres")
	a.exec([]string{server, "--single"}, i.depth+1)
	p := a.start(server)
	for _, f := range []string{"dict_snowball.so", "plpgsql.so"} {
		for _, lib := range []string{path.Join("/", path.Dir(real), "../lib", f), path.Join("/", path.Dir(real), "../lib/postgresql", f)} {
			a.dlopen(p, lib, Startup)
		}
	}
	a.exec([]string{"/bin/sh", "-c", "locale -a"}, i.depth+1)
}

func (a *analysis) mysql(i invocation) {
	s := settings{include: []string{"!include", "!includedir"}, whole: true}
	for _, f := range []string{option(i.argv, "--defaults-file"), "/etc/my.cnf", "/etc/mysql/my.cnf", "/usr/local/mysql/etc/my.cnf", a.env["HOME"] + "/.my.cnf"} {
		if f != "" {
			a.config(i.proc, f, s)
		}
	}
	for _, pattern := range []string{"/usr/share/mysql*/english/errmsg.sys", "/usr/share/mariadb/english/errmsg.sys", "/usr/share/m*/charsets/Index.xml"} {
		for _, f := range a.glob(pattern) {
			a.add(f, Startup)
		}
	}
	a.hostName()
	a.arguments(i, i.argv[1:])
	data := option(i.argv, "--datadir")
	if data == "" {
		data = "/var/lib/mysql"
	}
	// Where the image has a data directory, a server opens its logs, table spaces and tables of rights.
	for _, pattern := range []string{
		"/ib*", "/aria_log*", "/undo*", "/multi-master.info", "/mysql.ibd", "/mysql/*_priv.*", "/mysql/db.*", "/mysql/func.*", "/mysql/plugin.*", "/mysql/servers.*",
		"/mysql/event.*", "/mysql/gtid_slave_pos.*", "/mysql/innodb_*.ibd", "/mysql/roles_mapping.*", "/mysql/time_zone*.*", "/mysql/transaction_registry.*", "/mysql/user.*",
	} {
		for _, f := range a.glob(data + pattern) {
			a.add(f, Startup)
		}
	}
}

// supervisor starts what its configuration says.
func (a *analysis) supervisor(i invocation) {
	name := a.firstFile(option(i.argv, "-c", "--configuration"), "/etc/supervisor/supervisord.conf", "/etc/supervisord.conf")
	if name == "" {
		return
	}
	a.config(i.proc, name, settings{include: []string{"files"}, base: path.Dir(name)})
	for _, f := range a.configs() {
		for line := range strings.Lines(string(a.head("/"+f.Path, 1<<20))) {
			if k, v, ok := strings.Cut(line, "="); ok && strings.TrimSpace(k) == "command" {
				a.exec(strings.Fields(v), i.depth+1)
			}
		}
	}
}

// wellKnown predicts the configuration that a program reads without being told.
func (a *analysis) wellKnown(program string) {
	files := map[string][]string{
		"sshd": {"/etc/ssh/sshd_config"}, "rsyslogd": {"/etc/rsyslog.conf"}, "dnsmasq": {"/etc/dnsmasq.conf"}, "squid": {"/etc/squid/squid.conf"},
		"named": {"/etc/bind/named.conf"}, "unbound": {"/etc/unbound/unbound.conf"}, "influxd": {"/etc/influxdb/influxdb.conf"},
		"wget": {"/etc/wgetrc"}, "cron": {"/etc/crontab"}, "vsftpd": {"/etc/vsftpd.conf"}, "openssl": {"/etc/ssl/openssl.cnf"}, "mongod": {"/etc/mongod.conf"},
	}
	for _, f := range files[program] {
		a.add(f, Config)
	}
}
