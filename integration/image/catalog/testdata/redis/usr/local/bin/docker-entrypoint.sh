#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
# An option or a configuration is meant for the server.
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then
	set -- redis-server "$@"
fi
if [ "$1" = redis-server ] && [ "$(id -u)" = 0 ]; then
	find . ! -user redis -exec chown redis '{}' +
	exec gosu redis "$0" "$@"
fi
exec "$@"
