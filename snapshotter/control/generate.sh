#!/bin/sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
#
# Generates *.pb.go of *.proto. Needs protoc (Debian: protobuf-compiler); the plugins are built at
# the versions below into a directory of their own, so that no other ones on the PATH can get in.
set -eu
cd "$(dirname "$0")"

GRPC_PLUGIN=v1.6.2
# The plugin writes code for the runtime of its own version, so that one counts.
PROTOBUF=$(go list -m -f '{{.Version}}' google.golang.org/protobuf)

command -v protoc >/dev/null || { echo "generate.sh: protoc is missing; apt-get install protobuf-compiler" >&2; exit 1; }
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
# -mod=mod: GOFLAGS may say vendor or readonly, which go install pkg@version refuses or ignores.
GOBIN=$bin GOFLAGS=-mod=mod go install "google.golang.org/protobuf/cmd/protoc-gen-go@$PROTOBUF"
GOBIN=$bin GOFLAGS=-mod=mod go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$GRPC_PLUGIN"

# protoc's own version would stand in the output, and differ from one machine to the next for nothing.
protoc --plugin="$bin/protoc-gen-go" --plugin="$bin/protoc-gen-go-grpc" \
	--go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative control.proto hot.proto
sed -i -E '/^\/\/[[:space:]]+(- )?protoc[[:space:]]+v/d' *.pb.go
gofmt -w *.pb.go
