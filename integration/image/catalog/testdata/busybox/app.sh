# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
busybox mkdir -p /tmp
for i in 1 2 3 4 5; do
	echo "$i" >>/tmp/list
done
busybox sort -rn /tmp/list | busybox awk '{ sum += $1 } END { print "sum: " sum }'
