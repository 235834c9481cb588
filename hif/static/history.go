// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"path"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Kind says what a layer holds, as far as the step that made it tells.
type Kind string

// The kinds, of the paper's four of files: programs and libraries of the system are one here.
const (
	SystemLayer      Kind = "system"      // a distribution, and packages of the system: tools, libraries, certificates
	EngineLayer      Kind = "engine"      // an execution engine: a language runtime or a server
	ApplicationLayer Kind = "application" // application files
	OtherLayer       Kind = "other"       // directories, users, links, keys: nothing that a start needs to read at length
)

// Hot says if the paper stores layers of the kind on NVM.
func (k Kind) Hot() bool { return k == EngineLayer || k == ApplicationLayer }

// Layers is the paper's static analysis (section 2.4): the kind of each layer, bottom first, by the step of the history
// that made it. Layers without a step are system layers. An image of which nothing would be hot keeps its last system
// layer as an application: a start reads something, and what is above the distribution is closest to it.
//
// The rules, of which the first that holds decides:
//
//  1. ADD of an archive to "/" as the first layer is the distribution: system.
//  2. COPY and ADD bring application files, but for certificates, keys and the package manager's own configuration: system.
//  3. RUN is read command by command; the strongest of its commands decides (application, engine, system, other):
//     installing with pip, npm, gem, composer, bundler, cpan and the like, cloning, and unpacking a download is
//     application, as is every other download but of keys and of the small programs that entrypoints use; installing a
//     package whose name is that of a known engine, building one (make install and the like), and naming a variable of
//     the image's own version or choosing a build by architecture is engine; installing other packages is system.
//  4. Everything else is other.
//
// Of a step that is told cut short only what is there is judged.
func Layers(history []v1.History, layers int) []Kind {
	kinds := make([]Kind, 0, max(0, layers))
	for _, h := range history {
		if h.EmptyLayer {
			continue
		}
		if len(kinds) == layers {
			break
		}
		kinds = append(kinds, stepKind(h.CreatedBy, len(kinds) == 0 && layers > 1))
	}
	for len(kinds) < layers {
		kinds = append(kinds, SystemLayer)
	}
	if !slices.ContainsFunc(kinds, Kind.Hot) {
		for i := len(kinds) - 1; i >= 0; i-- {
			if kinds[i] == SystemLayer {
				kinds[i] = ApplicationLayer
				break
			}
		}
	}
	return kinds
}

var (
	stepShell     = regexp.MustCompile(`^(?:\|\d+ .*?)?(?:/bin/)?(?:ba|a|da)?sh (?:-[a-z]+ |-o \w+ )*-[a-z]*c `)
	stepNop       = regexp.MustCompile(`^#\(nop\)\s*`)
	stepSeparator = regexp.MustCompile(`&&|\|\||[;|\n()]|\s[{}]\s|^\{\s|\b(?:then|do|else|if|while|elif)\b`)
	// ownVersion is a variable that image authors name after the program that the image is for.
	ownVersion = regexp.MustCompile(`\$\{?\w*(?:VERSION|MAJOR|PACKAGE|RELEASE|_URL|_TGZ|_DIST|_SHA\d*|_HOME|_DOWNLOAD)\w*`)
	// ownBuild is said by steps that bring what the image is for: its version, or its builds for architectures.
	ownBuild = regexp.MustCompile(ownVersion.String() + `|\bdpkgArch=|\b\w*ARCH=|dpkg --print-architecture`)
	archive  = regexp.MustCompile(`(?i)\.(?:tgz|tar(?:\.\w+)?|zip|war|jar|deb|rpm|phar|whl)\b|tarball|_TGZ|_URL|download`)
)

func stepKind(step string, first bool) Kind {
	const most = 64 << 10
	step = strings.TrimSpace(step[:min(len(step), most)])
	step = strings.TrimSpace(strings.TrimSuffix(step, "# buildkit"))
	step = stepShell.ReplaceAllString(step, "")
	nop := stepNop.MatchString(step)
	step = stepNop.ReplaceAllString(step, "")
	verb, rest, _ := strings.Cut(step, " ")
	switch strings.ToUpper(verb) {
	case "ADD", "COPY":
		return copyKind(strings.TrimSpace(rest), first)
	case "RUN":
		return runKind(stepShell.ReplaceAllString(strings.TrimSpace(rest), ""))
	case "CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "MAINTAINER", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR", "ARG", "SHELL", "HEALTHCHECK":
		return OtherLayer
	}
	if nop {
		return OtherLayer
	}
	if first && !strings.Contains(step, " install ") {
		return SystemLayer // "bazel build …", "debian.sh …", "": a base made by other tools
	}
	return runKind(step)
}

func copyKind(what string, first bool) Kind {
	fields := strings.Fields(what)
	if len(fields) == 0 {
		return OtherLayer
	}
	target := fields[len(fields)-1]
	source := fields[0]
	if first && target == "/" && (strings.HasPrefix(source, "file:") || strings.Contains(source, "rootfs") || archive.MatchString(source)) {
		return SystemLayer
	}
	for _, dir := range []string{"/etc/apt", "/etc/yum", "/etc/apk", "/etc/ssl", "/etc/pki", "/usr/share/keyrings", "/usr/local/share/ca-certificates", "/etc/ld.so"} {
		if strings.HasPrefix(target, dir) {
			return SystemLayer
		}
	}
	return ApplicationLayer
}

// strength orders the kinds of a step's commands.
var strength = map[Kind]int{OtherLayer: 0, SystemLayer: 1, EngineLayer: 2, ApplicationLayer: 3}

func runKind(step string) Kind {
	kind := OtherLayer
	fetched := ""
	for _, c := range stepSeparator.Split(step, -1) {
		words := strings.Fields(c)
		for len(words) > 0 && (isAssignment(words[0]) || slices.Contains([]string{"sudo", "exec", "!", "gosu", "set"}, words[0])) {
			if words[0] == "set" {
				words = nil
				break
			}
			words = words[1:]
		}
		if len(words) == 0 {
			continue
		}
		k, url := commandKind(words)
		if url != "" {
			fetched = url
		}
		if strength[k] > strength[kind] {
			kind = k
		}
	}
	if isHelper(step) {
		return kind
	}
	if fetched != "" && strength[kind] < strength[ApplicationLayer] {
		return ApplicationLayer
	}
	if strength[kind] < strength[EngineLayer] && ownBuild.MatchString(step) {
		return EngineLayer
	}
	return kind
}

func isAssignment(w string) bool {
	name, _, ok := strings.Cut(w, "=")
	return ok && isName(name)
}

// isHelper says if a download is one of the small programs that entrypoints use.
func isHelper(step string) bool {
	for _, h := range []string{"gosu", "tini", "dumb-init", "su-exec", "apt-key", "keyserver"} {
		if strings.Contains(step, h) {
			return true
		}
	}
	return false
}

// installers are package managers of distributions with the words by which they install.
var installers = map[string][]string{
	"apt-get": {"install"}, "apt": {"install"}, "aptitude": {"install"}, "yum": {"install", "localinstall"}, "dnf": {"install"}, "microdnf": {"install"},
	"zypper": {"install", "in"}, "apk": {"add"}, "pacman": {"-S", "-Sy", "-Syu"}, "emerge": {}, "dpkg": {"-i", "--install"}, "rpm": {"-i", "-ivh", "-Uvh", "-U"},
	"tdnf": {"install"}, "urpmi": {}, "opkg": {"install"}, "tce-load": {},
}

// languageInstallers bring libraries and programs of a language: application files.
var languageInstallers = map[string][]string{
	"pip": {"install"}, "npm": {"install", "ci", "i"}, "yarn": {"install", "add", "global"}, "pnpm": {"install"}, "gem": {"install"}, "bundle": {"install"},
	"composer": {"install", "update", "create-project", "require"}, "cpan": {}, "cpanm": {}, "pecl": {"install"}, "docker-php-ext-install": {}, "conda": {"install"},
	"poetry": {"install"}, "uv": {"sync", "pip"}, "easy_install": {}, "go": {"build", "install", "get"}, "cargo": {"build", "install"}, "mvn": {}, "gradle": {},
	"lein": {}, "luarocks": {"install"}, "install2.r": {}, "git": {"clone"}, "svn": {"co", "checkout"}, "stack": {"install", "build"}, "mix": {"do", "deps.get"},
	"rebar3": {}, "bower": {"install"}, "dotnet": {"publish", "build"},
}

func commandKind(words []string) (kind Kind, fetched string) {
	program := path.Base(words[0])
	base := baseName(program)
	args := words[1:]
	if (base == "python" || base == "php") && len(args) > 1 && (args[0] == "-m" || strings.Contains(args[0], "composer")) {
		return commandKind(args[max(0, min(1, strings.Index(args[0], "m"))):])
	}
	has := func(verbs []string) bool {
		return len(verbs) == 0 || slices.ContainsFunc(args, func(a string) bool { return slices.Contains(verbs, a) })
	}
	if verbs, ok := languageInstallers[base]; ok && has(verbs) {
		return ApplicationLayer, ""
	}
	if verbs, ok := installers[base]; ok && has(verbs) {
		if slices.Contains(args, ".build-deps") || slices.Contains(args, "--virtual") && slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, ".") && !strings.Contains(a, "run") }) {
			return SystemLayer, "" // removed again in the same step
		}
		for _, a := range args {
			if isEngine(a) {
				return EngineLayer, ""
			}
		}
		return SystemLayer, ""
	}
	switch base {
	case "curl", "wget", "fetch":
		if slices.ContainsFunc(args, func(a string) bool {
			return strings.HasSuffix(a, ".asc") || strings.HasSuffix(a, ".gpg") || strings.HasSuffix(a, ".key")
		}) {
			return OtherLayer, ""
		}
		return OtherLayer, strings.Join(args, " ")
	case "make":
		if slices.Contains(args, "install") || ownVersion.MatchString(strings.Join(args, " ")) {
			return EngineLayer, ""
		}
	case "configure":
		return EngineLayer, ""
	case "buildDeps", "fetchDeps":
		return SystemLayer, ""
	}
	return OtherLayer, ""
}

// engineNames begin the names of packages of execution engines and servers, in Debian, Alpine and Red Hat.
var engineNames = strings.Fields("python pypy openjdk default-jre default-jdk java-1 ibm-java zulu temurin nodejs node ruby jruby php hhvm erlang elixir esl-erlang mono-devel " +
	"mono-runtime mono-complete r-base r-cran littler ghc golang gcc-go julia lua luajit tcl guile swipl sbcl clojure scala groovy dotnet " +
	"nginx apache2 httpd lighttpd haproxy varnish caddy traefik tomcat jetty mysql-server mysql-community-server mariadb-server mariadb percona-server percona-xtradb postgresql redis " +
	"memcached mongodb mongo couchdb rethinkdb cassandra elasticsearch kibana logstash influxdb neo4j rabbitmq zookeeper mosquitto nats solr sqlite3 " +
	"supervisor ros- ant maven gradle gazebo wordpress drupal ghost jenkins sonarqube zend-server squid bind9 postfix dovecot znc thrift crate rust cargo fsharp haxe")

func isEngine(pkg string) bool {
	if ownVersion.MatchString(pkg) {
		return true
	}
	name, _, _ := strings.Cut(strings.Trim(strings.ToLower(pkg), `"'`), "=")
	// Headers, clients, documentation and small tools are not what runs.
	for _, suffix := range []string{"-dev", "-devel", "-client", "-doc", "-common", "-dbg"} {
		if strings.HasSuffix(name, suffix) {
			return false
		}
	}
	if strings.HasSuffix(name, "-perl") || strings.HasSuffix(name, "-java") {
		return true // libraries of an engine, as python3-… and ruby-… are
	}
	return slices.ContainsFunc(engineNames, func(e string) bool {
		rest, ok := strings.CutPrefix(name, e)
		return ok && (rest == "" || strings.HasSuffix(e, "-") || strings.ContainsAny(rest[:1], "-.0123456789_"))
	})
}
