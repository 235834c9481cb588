#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
gcc -O2 -Wall -o /tmp/app /usr/src/app/main.c
/tmp/app
