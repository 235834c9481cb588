#!/bin/bash
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
. /etc/os-release
umask 027
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
for i in $(seq 10); do
	printf '%s %s\n' "$i" "$(date -u +%s)" >>"$work/list"
done
sort -rn "$work/list" | awk '{ sum += $1 } END { print sum }' >"$work/sum"
tar -C "$work" -czf "$work/all.tar.gz" list sum
tar -tzf "$work/all.tar.gz" | grep -q sum
id -un | sed 's/^/user: /'
echo "$NAME ${ID}: $(cat "$work/sum")"
