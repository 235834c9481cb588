// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package static_test

import (
	"archive/tar"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
)

// A subject is an image and how to see that its start is over.
type subject struct {
	image.Spec
	// ready is a bash command run beside the container, in its network. "": the start is over when the program ends, well.
	ready string
	// heldOut marks an image that the rules were not written with.
	heldOut bool
}

const httpReady = `exec 3<>/dev/tcp/127.0.0.1/$PORT && printf 'GET / HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3 && head -1 <&3 | grep -q ' 200 '`

var epoch = time.Unix(1700000000, 0)

func directory(name string) image.Entry {
	return image.Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: epoch}}
}

func content(name string, mode int64, data string) image.Entry {
	return image.Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, ModTime: epoch}, Data: []byte(data)}
}

// debian is a minimal Debian, an engine out of packages, and application files above.
func debian(name, packages string, config v1.Config, files ...image.Entry) image.Spec {
	spec := image.Spec{Name: name, Config: config, Steps: []image.Step{
		{Base: []string{}, History: "/bin/sh -c #(nop) ADD file:eb251942 in / "},
	}}
	if packages != "" {
		spec.Steps = append(spec.Steps, image.Step{
			Packages: fields(packages),
			History:  "/bin/sh -c apt-get update && apt-get install -y --no-install-recommends " + packages + " && rm -rf /var/lib/apt/lists/*",
		})
	}
	if len(files) > 0 {
		spec.Steps = append(spec.Steps, image.Step{Files: files, History: "COPY . /app # buildkit"})
	}
	return spec
}

// subjects are the images of the evaluation. Their programs load what programs of the language commonly load.
func subjects(t *testing.T) []subject {
	return []subject{
		{Spec: debian("shell", "", v1.Config{Entrypoint: []string{"/docker-entrypoint.sh"}, Cmd: []string{"sleep", "0"}},
			content("docker-entrypoint.sh", 0o755, shellApp))},
		{Spec: goImage(t)},
		{Spec: debian("python", "python3", v1.Config{Cmd: []string{"python3", "app.py"}, WorkingDir: "/app"},
			directory("app"), content("app/app.py", 0o644, pythonApp), content("app/helper.py", 0o644, "import csv, uuid\nNAME = 'helper'\n"))},
		{Spec: debian("flask", "python3-flask", v1.Config{Cmd: []string{"/usr/bin/flask", "--app", "/app/web.py", "run", "-p", "8000"}},
			directory("app"), content("app/web.py", 0o644, flaskApp)), ready: "PORT=8000; " + httpReady},
		{Spec: debian("nginx", "nginx-light", v1.Config{Cmd: []string{"nginx", "-g", "daemon off;"}}), ready: "PORT=80; " + httpReady},
		{Spec: debian("redis", "redis-server", v1.Config{Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"redis-server", "/etc/redis/redis.conf", "--daemonize", "no"}, WorkingDir: "/data"},
			directory("data"), directory("usr"), directory("usr/local"), directory("usr/local/bin"), content("usr/local/bin/docker-entrypoint.sh", 0o755, redisEntry)),
			ready: `exec 3<>/dev/tcp/127.0.0.1/6379 && printf 'PING\r\n' >&3 && head -1 <&3 | grep -q PONG`},
		{Spec: debian("perl", "libwww-perl", v1.Config{Cmd: []string{"/app/app.pl"}},
			directory("app"), content("app/app.pl", 0o755, perlApp))},
		{Spec: debian("node", "nodejs node-express", v1.Config{Cmd: []string{"node", "server.js"}, WorkingDir: "/app"},
			directory("app"), content("app/server.js", 0o644, nodeApp), content("app/package.json", 0o644, `{"name":"app","main":"server.js"}`)),
			ready: "PORT=8000; " + httpReady},
		{Spec: debian("java", "default-jre-headless", v1.Config{Cmd: []string{"java", "-version"}})},
		{Spec: debian("ant", "ant", v1.Config{Cmd: []string{"ant", "-f", "/app/build.xml"}},
			directory("app"), content("app/build.xml", 0o644, antApp))},
		{Spec: debian("ruby", "ruby", v1.Config{Cmd: []string{"ruby", "/app/app.rb"}},
			directory("app"), content("app/app.rb", 0o644, rubyApp), content("app/helper.rb", 0o644, "require 'set'\nmodule Helper; end\n"))},
		{Spec: debian("php", "php-cli", v1.Config{Cmd: []string{"php", "/app/index.php"}},
			directory("app"), content("app/index.php", 0o644, phpApp), content("app/helper.php", 0o644, "<?php function helper() { return 1; }\n"))},
		{Spec: debian("apache", "apache2", v1.Config{Cmd: []string{"apache2ctl", "-D", "FOREGROUND"}}), ready: "PORT=80; " + httpReady},
		{Spec: debian("postgres", "postgresql-15", v1.Config{Entrypoint: []string{"/entry.sh"}, Cmd: []string{"postgres"}, Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin", "PGDATA=/var/lib/postgresql/data", "LANG=C.UTF-8"}},
			content("entry.sh", 0o755, postgresEntry)), ready: `chroot "$ROOT" su postgres -c '/usr/lib/postgresql/15/bin/psql -c "select 1"'`},

		{Spec: debian("gunicorn", "gunicorn python3-django", v1.Config{Cmd: []string{"gunicorn", "-b", "127.0.0.1:8000", "web:app"}, WorkingDir: "/app"},
			directory("app"), content("app/web.py", 0o644, djangoApp)), ready: "PORT=8000; " + httpReady, heldOut: true},
		{Spec: debian("memcached", "memcached", v1.Config{Cmd: []string{"memcached", "-u", "nobody"}}),
			ready: `exec 3<>/dev/tcp/127.0.0.1/11211 && printf 'version\r\n' >&3 && head -1 <&3 | grep -q VERSION`, heldOut: true},
		{Spec: debian("mariadb", "mariadb-server", v1.Config{Entrypoint: []string{"/entry.sh"}, Cmd: []string{"mariadbd", "--user=mysql"}},
			content("entry.sh", 0o755, mariadbEntry)), ready: `chroot "$ROOT" mariadb -e 'select 1'`, heldOut: true},
		{Spec: debian("haproxy", "haproxy", v1.Config{Cmd: []string{"haproxy", "-f", "/app/haproxy.cfg"}},
			directory("app"), content("app/haproxy.cfg", 0o644, haproxyConfig)), ready: "PORT=8000; " + httpReady, heldOut: true},
		{Spec: debian("sinatra", "ruby-sinatra", v1.Config{Cmd: []string{"ruby", "/app/app.rb"}},
			directory("app"), content("app/app.rb", 0o644, sinatraApp)), heldOut: true},
		{Spec: debian("supervisor", "supervisor", v1.Config{Cmd: []string{"supervisord", "-n", "-c", "/app/supervisord.conf"}},
			directory("app"), content("app/supervisord.conf", 0o644, supervisorConfig)), ready: `test -e "$ROOT/tmp/ready"`, heldOut: true},
	}
}

const djangoApp = `from django.conf import settings
from django.http import HttpResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, SECRET_KEY='x', ALLOWED_HOSTS=['*'])
urlpatterns = [path('', lambda request: HttpResponse('hello'))]

from django.core.wsgi import get_wsgi_application
app = get_wsgi_application()
`

const mariadbEntry = `#!/bin/sh
set -e
install -d -o mysql -g mysql /var/lib/mysql /run/mysqld
if [ ! -d /var/lib/mysql/mysql ]; then
	mariadb-install-db --user=mysql --skip-test-db >/dev/null
fi
exec "$@"
`

const haproxyConfig = `defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
frontend web
    bind 127.0.0.1:8000
    http-request return status 200 content-type text/plain string hello
`

const sinatraApp = `require 'sinatra/base'
require 'stringio'
class App < Sinatra::Base
  get('/') { 'hello' }
end
puts App.call('REQUEST_METHOD' => 'GET', 'PATH_INFO' => '/', 'rack.input' => StringIO.new).first
`

const supervisorConfig = `[supervisord]
nodaemon=true
[program:touch]
command=/usr/bin/touch /tmp/ready
autorestart=false
`

const shellApp = `#!/bin/sh
set -e
umask 027
if [ "${1#-}" != "$1" ]; then
	set -- sleep "$@"
fi
mkdir -p /tmp/state
for f in /etc/hostname /etc/debian_version; do
	[ ! -e "$f" ] || cat "$f" >/dev/null
done
sed -n 's/root/x/p' /etc/passwd | grep -c x >/dev/null
exec "$@"
`

const redisEntry = `#!/bin/sh
set -e
# first arg is an option or a configuration: the server is meant
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then
	set -- redis-server "$@"
fi
if [ "$1" = 'redis-server' ] && [ "$(id -u)" = '0' ]; then
	find . \! -user redis -exec chown redis '{}' +
fi
exec "$@"
`

const postgresEntry = `#!/bin/bash
set -Eeuo pipefail
if [ "$(id -u)" = '0' ]; then
	mkdir -p "$PGDATA" /var/run/postgresql
	chown -R postgres:postgres "$PGDATA" /var/run/postgresql
	exec setpriv --reuid=postgres --regid=postgres --init-groups "$BASH_SOURCE" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
	initdb --username=postgres --no-sync >/dev/null
fi
exec "$@"
`

const pythonApp = `import argparse
import http.server
import json
import logging
import os
import sqlite3
import ssl
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from helper import NAME

def main():
    argparse.ArgumentParser().parse_args()
    logging.basicConfig(level=logging.INFO)
    with ThreadPoolExecutor(1) as pool:
        logging.info(pool.submit(json.dumps, {'name': NAME, 'at': datetime.now().isoformat()}).result())
    sqlite3.connect(':memory:').execute('select 1')
    ssl.create_default_context()

if __name__ == '__main__':
    main()
`

const flaskApp = `from flask import Flask
app = Flask(__name__)

@app.route('/')
def index():
    return 'hello'
`

const perlApp = `#!/usr/bin/perl
use strict;
use warnings;
use File::Temp qw(tempfile);
use Getopt::Long;
use IO::Socket::INET;
use JSON::PP;
use LWP::UserAgent;
use POSIX qw(strftime);
use Time::HiRes qw(time);
GetOptions('x' => \my $x);
my ($fh, $name) = tempfile(UNLINK => 1);
print {$fh} encode_json({ at => strftime('%F', gmtime(time)) });
`

const nodeApp = `'use strict';
const express = require('express');
const path = require('path');
const app = express();
app.get('/', (req, res) => res.send('hello ' + path.basename(__filename)));
app.listen(8000);
`

const antApp = `<project default="hello"><target name="hello"><echo message="hello"/></target></project>
`

const rubyApp = `require 'json'
require 'logger'
require 'net/http'
require 'optparse'
require 'erb'
require_relative 'helper'
Logger.new($stdout).info(JSON.generate('at' => Time.now.to_i))
puts ERB.new('<%= 1 %>').result
`

const phpApp = `<?php
require_once __DIR__ . '/helper.php';
echo json_encode(['n' => helper(), 'at' => date('c')]), "\n";
`

const goApp = `package main

import (
	"fmt"
	"net/http"
	"os/user"
	"time"
)

func main() {
	_, err := user.Current()
	zone, err2 := time.LoadLocation("UTC")
	fmt.Println(http.MethodGet, zone, err, err2)
}
`

// goImage is a static binary on nothing.
func goImage(t *testing.T) image.Spec {
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	require.NoError(t, os.WriteFile(source, []byte(goApp), 0o600))
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", filepath.Join(dir, "server"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	program, err := os.ReadFile(filepath.Join(dir, "server"))
	require.NoError(t, err)
	return image.Spec{Name: "go", Config: v1.Config{Entrypoint: []string{"/server"}}, Steps: []image.Step{
		{Files: []image.Entry{directory("etc"), content("etc/passwd", 0o644, "root:x:0:0:root:/root:/sbin/nologin\n")}, History: "COPY /etc/passwd /etc/passwd # buildkit"},
		{Files: []image.Entry{content("server", 0o755, string(program))}, History: "COPY /server /server # buildkit"},
	}}
}
