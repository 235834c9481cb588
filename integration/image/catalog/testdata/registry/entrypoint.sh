#!/bin/busybox sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
case "$1" in
*.yml) set -- docker-registry serve "$@" ;;
esac
exec "$@"
