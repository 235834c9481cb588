#!/bin/bash
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
#
# Runs containerd with nhybrid in QEMU guests with emulated persistent memory (docs/pmem.md), with the programs built anew.
# Arguments go to the test: -fs ext4, -snapshotter overlayfs, …
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
make --no-print-directory tools-core build scmlib-c
# Not go run, which would stand between a signal and the guests.
mkdir -p out/cache/pmem
go build -o out/cache/pmem/test-pmem ./integration/pmem
exec out/cache/pmem/test-pmem "$@"
