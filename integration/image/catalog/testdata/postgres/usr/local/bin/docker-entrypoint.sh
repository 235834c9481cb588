#!/bin/bash
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -Eeuo pipefail
if [ "$(id -u)" = 0 ]; then
	mkdir -p "$PGDATA" /var/run/postgresql
	chown -R postgres "$PGDATA" /var/run/postgresql
	chmod 700 "$PGDATA"
	exec gosu postgres "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
	initdb --username=postgres --auth=trust
fi
exec "$@"
