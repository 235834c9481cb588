#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
. /etc/zookeeper/conf/environment
mkdir -p "$ZOO_LOG_DIR"
exec "$JAVA" -cp "$CLASSPATH" "-Dzookeeper.log.dir=$ZOO_LOG_DIR" "-Dzookeeper.root.logger=$ZOO_LOG4J_PROP" "$ZOOMAIN" "$ZOOCFG"
