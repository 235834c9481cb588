#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
set -e
cd /go/src/hello
go build -o /tmp/hello main.go
exec /tmp/hello
