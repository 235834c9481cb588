#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
javac -d /tmp /usr/src/app/Hello.java
exec java -cp /tmp Hello
