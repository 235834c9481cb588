// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"net/http"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image/ready"
)

// ends is the sign of a program that does something and ends.
const ends = "ends with status 0 and its output"

func program(words ...string) app {
	return app{config: v1.Config{Cmd: words}, sign: ends}
}

func (a app) says(output string) app {
	a.output = output
	return a
}

// serves is a program that is ready once it gives the right answer.
func serves(sign string, check ready.Check, words ...string) app {
	return app{config: v1.Config{Cmd: words}, sign: sign, ready: check}
}

func (a app) entry(words ...string) app {
	a.config.Entrypoint = words
	return a
}

func (a app) env(vars ...string) app {
	a.config.Env = vars
	return a
}

func (a app) in(dir string) app {
	a.config.WorkingDir = dir
	return a
}

func (a app) with(dir string) app {
	a.files = dir
	return a
}

func (a app) after(run string) app {
	a.run = run
	return a
}

func (a app) without(layer int, files string) app {
	a.purge = map[int]string{layer: "rm -rf " + files}
	return a
}

const entrypoint = "docker-entrypoint.sh"

// apps by the image of the table. Entrypoints do what those of the originals do; the data directories of databases are
// made at the start, as with the originals.
var apps = map[string]app{
	"debian":         program("hello.sh").says("Debian GNU/Linux debian: 55"),
	"neurodebian":    program("hello.sh").says("Debian GNU/Linux debian: 55").with("debian"),
	"busybox":        program("/bin/busybox", "sh", "/app.sh").env("PATH=/bin").says("sum: 15"),
	"buildpack-deps": program("build.sh").says("hello from c"),

	"redis": serves("PING is answered with PONG", ready.Line(6379, "PING\r\n", "PONG"), "redis-server").
		entry(entrypoint).in("/data").after("mkdir -p /data && chown redis:redis /data"),
	"postgres": serves("select 1 gives a row", ready.Postgres(5432, "postgres"), "postgres").entry(entrypoint).
		env("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin",
			"PGDATA=/var/lib/postgresql/data", "LANG=C.UTF-8").without(7, "/var/lib/postgresql/15 /etc/postgresql/15"),
	"mariadb": serves("select 1 gives a result", ready.MySQL(3306, "root"), "mariadbd", "--bind-address=0.0.0.0",
		"--skip-name-resolve", "--init-file=/etc/mysql/init.sql").entry(entrypoint).without(8, "/var/lib/mysql"),
	"memcached": serves("version is answered", ready.Line(11211, "version\r\n", "VERSION"), "memcached", "-u", "memcache").
		with("-"),
	"influxdb": serves("GET /ping: 204", ready.HTTP(8086, "/ping", http.StatusNoContent, ""), "influxd", "-config", "/etc/influxdb/influxdb.conf").
		with("-"),

	"python":  program("python3", "main.py").in("/app").says("hello from python"),
	"golang":  program("build.sh").env("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GOPATH=/go", "HOME=/root").says(`{"hello":"from go"}`),
	"openjdk": program("build.sh").says("hello from java"),
	"ruby":    program("ruby", "/app/main.rb").says("hello from ruby"),
	"perl":    program("/app/main.pl").says("hello from perl"),
	"php":     program("php", "/app/main.php").says("hello from php"),
	"erlang":  program("/app/main.escript").says("hello from erlang"),
	"r-base":  program("Rscript", "/app/main.R").env("LC_ALL=C.UTF-8").says("hello from r"),
	"maven":   program("mvn", "-B", "-o", "validate").in("/usr/src/app").env("MAVEN_CONFIG=/root/.m2").says("BUILD SUCCESS"),

	"nginx": serves("GET /: 200", ready.HTTP(80, "/", http.StatusOK, "nginx"), "nginx", "-g", "daemon off;").with("-"),
	"httpd": serves("GET /: 200", ready.HTTP(80, "/", http.StatusOK, "Apache2"), "httpd-foreground"),
	"tomcat": serves("GET /: 200", ready.HTTP(8080, "/", http.StatusOK, "It works"), "/usr/share/tomcat10/bin/catalina.sh", "run").
		env("CATALINA_HOME=/usr/share/tomcat10", "CATALINA_BASE=/var/lib/tomcat10").with("-"),
	"jetty": serves("GET /: 200", ready.HTTP(8080, "/", http.StatusOK, "jetty"), "java", "-Djetty.home=/usr/share/jetty9",
		"-Djetty.base=/usr/share/jetty9", "-Djava.io.tmpdir=/tmp", "-jar", "/usr/share/jetty9/start.jar").with("-"),
	"haproxy": serves("GET /: 200", ready.HTTP(8080, "/", http.StatusOK, "hello"), "haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"),

	"node": serves("GET /: 200", ready.HTTP(3000, "/", http.StatusOK, "hello from node"), "node", "server.js").in("/app"),
	"iojs": program("node", "/app/main.js").says("hello from io.js"),
	"django": serves("GET /: 200", ready.HTTP(8000, "/", http.StatusOK, "from django"), "python3", "web.py", "runserver", "--noreload", "0.0.0.0:8000").
		in("/app"),
	"rails": serves("GET /: 200", ready.HTTP(9292, "/", http.StatusOK, "hello from rails"), "rackup", "-o", "0.0.0.0", "-p", "9292").
		in("/app").env("RAILS_ENV=production", "LANG=C.UTF-8"),

	"rabbitmq": serves("the handshake of AMQP", ready.AMQP(5672), "/usr/lib/rabbitmq/bin/rabbitmq-server").entry(entrypoint).
		env("RABBITMQ_NODENAME=rabbit@localhost", "HOME=/var/lib/rabbitmq", "LANG=C.UTF-8",
			"PATH=/usr/lib/rabbitmq/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
	// Without a configuration WordPress shows the page that asks for the database, as the original image does.
	"wordpress": serves("GET /wp-admin/setup-config.php: 200", ready.HTTP(80, "/wp-admin/setup-config.php", http.StatusOK, "WordPress"),
		"httpd-foreground").after("rm /usr/share/wordpress/wp-config.php"),
	"registry": app{extract: map[int][]string{2: {"docker-registry", "libc6"}}}.like(
		serves("GET /v2/: 200", ready.HTTP(5000, "/v2/", http.StatusOK, ""), "/etc/docker/registry/config.yml").
			entry("/entrypoint.sh").env("PATH=/usr/bin:/bin")),
	"eclipse-mosquitto": app{extract: map[int][]string{1: {
		"mosquitto", "libc6", "libcap2", "libcjson1", "libdlt2", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libmosquitto1",
		"libnsl2", "libssl3", "libsystemd0", "libtirpc3", "libgssapi-krb5-2", "libkrb5-3", "libk5crypto3", "libcom-err2", "libkrb5support0",
		"libkeyutils1", "libwebsockets17", "libev4", "libuv1", "libwrap0", "libzstd1", "zlib1g",
	}}}.like(serves("CONNECT is accepted", ready.MQTT(1883), "/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf").
		env("PATH=/usr/sbin:/usr/bin:/bin")),
	"zookeeper": serves("srvr is answered", ready.Line(2181, "srvr", "Zookeeper version"), entrypoint).env("ZOO_LOG4J_PROP=INFO,CONSOLE"),
}

// like is the other app with this one's packages.
func (a app) like(b app) app {
	b.extract = a.extract
	return b
}
