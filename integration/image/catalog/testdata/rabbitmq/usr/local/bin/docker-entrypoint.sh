#!/bin/bash
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
if [ "$(id -u)" = 0 ]; then
	chown -R rabbitmq /var/lib/rabbitmq /var/log/rabbitmq
	exec gosu rabbitmq "$0" "$@"
fi
exec "$@"
