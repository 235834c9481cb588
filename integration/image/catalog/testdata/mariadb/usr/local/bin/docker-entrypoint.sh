#!/bin/bash
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
if [ "$(id -u)" = 0 ]; then
	mkdir -p /var/lib/mysql /run/mysqld
	chown -R mysql /var/lib/mysql /run/mysqld
	exec gosu mysql "$0" "$@"
fi
if [ ! -d /var/lib/mysql/mysql ]; then
	# By force, since nothing resolves the name of a host that ctr made.
	mariadb-install-db --auth-root-authentication-method=normal --skip-test-db --force
fi
exec "$@"
