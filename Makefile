# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DEFAULT_GOAL := help

# A build must not depend on which toolchain happens to be downloadable today: the installed Go is used or refused.
export GOTOOLCHAIN ?= local
export DEBIAN_FRONTEND := noninteractive

BIN     := $(CURDIR)/bin
OUT     := $(CURDIR)/out
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -X main.version=$(VERSION)
# The same flags for build, vet, test and run, or each would fill the build cache anew.
export GOFLAGS += -trimpath -buildvcs=false
STRIP   := -ldflags '-s -w'

# What the build, the tests and the demo take from Debian 12 beside Go, make and git.
DEB_BUILD := ca-certificates gcc libc6-dev pkg-config libseccomp-dev
DEB_RUN   := attr busybox-static containernetworking-plugins e2fsprogs erofs-utils iproute2 iptables mmdebstrap \
             mount strace util-linux xfsprogs
DEB_GEN   := protobuf-compiler
# igzip, which containerd takes where it is in its PATH: bench-deploy compares with that too.
DEB_DEPLOY := isal
# What bench-scm compares with, and builds its programs with.
DEB_SCM   := gcc libc6-dev binutils libpmemobj-dev libsqlite3-dev redis-server redis-tools

.PHONY: help
help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

## What is built ---------------------------------------------------------------------------------------------------

# The hook runs at the start of each container with a region: static and small.
.PHONY: build
build: ## Build the daemon, nhybridctl and the hook for regions into bin/.
	go build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/containerd-nhybrid-grpc ./cmd/nhybridctl
	CGO_ENABLED=0 go build $(STRIP) -o $(BIN)/ ./cmd/nhybrid-scm-hook

.PHONY: scmlib-c
scmlib-c: ## Build libscm for C and C++ and libscm_preload into out/scmlib-c (install: make -C scmlib/c install PREFIX=).
	@tools/deps gcc libc6-dev binutils
	$(MAKE) -C scmlib/c O=$(OUT)/scmlib-c

.PHONY: generate
generate: ## Regenerate code and config.toml.example (needs protoc from Debian).
	@tools/deps $(DEB_BUILD) $(DEB_GEN)
	go generate ./...

.PHONY: deps
deps: ## Install the Debian packages that build, tests and demo need.
	@tools/deps $(DEB_BUILD) $(DEB_RUN)

# Each set of tools is its own module, so that none raises the versions of another. A stamp holds the fact that the
# binaries in bin/ are those of the pinned go.mod.
.PHONY: tools
tools: tools-core $(BIN)/.cri $(BIN)/.nerdctl ## Build the pinned containerd, ctr, runc, crane, crictl, nerdctl into bin/.

.PHONY: tools-core
tools-core: $(BIN)/.tools

$(BIN)/.tools: tools/go.mod tools/go.sum | tool-deps
	go build -C tools -tags seccomp $(STRIP) -o $(BIN)/ tool
	@touch $@

$(BIN)/.cri: tools/cri/go.mod tools/cri/go.sum
	go build -C tools/cri -ldflags '-s -w -X github.com/kubernetes-sigs/cri-tools/pkg/version.Version=v1.30.0' -o $(BIN)/ tool
	@touch $@

# The module proxy serves few versions of nerdctl and may cease to serve this one too. Only that is forgiven, and
# only loudly: the reason is kept in bin/.nerdctl-unobtainable, and tests that need nerdctl skip with it.
$(BIN)/.nerdctl: tools/nerdctl/go.mod tools/nerdctl/go.sum
	@mkdir -p $(BIN); rm -f $(BIN)/.nerdctl-unobtainable
	@if ! go list -C tools/nerdctl -deps tool >/dev/null 2>$(BIN)/.nerdctl-unobtainable; then \
	  echo "WARNING: nerdctl cannot be obtained; its tests will be skipped:" >&2; \
	  sed 's/^/WARNING:   /' $(BIN)/.nerdctl-unobtainable >&2; \
	else \
	  rm -f $(BIN)/.nerdctl-unobtainable; set -x; \
	  go build -C tools/nerdctl $(STRIP) -o $(BIN)/ tool; touch $@; \
	fi

$(BIN)/.lint: tools/lint/go.mod tools/lint/go.sum
	go build -C tools/lint $(STRIP) -o $(BIN)/ tool
	@touch $@

.PHONY: tool-deps
tool-deps:
	@tools/deps $(DEB_BUILD)

## What is checked -------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(BIN)/.lint ## Check format, vet (by golangci-lint) and style.
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs -r gofmt -l); \
	  if [ -n "$$unformatted" ]; then echo "not formatted (run gofmt -w): $$unformatted" >&2; exit 1; fi
	$(BIN)/golangci-lint run --build-tags integration ./...

.PHONY: test
test: ## Run everything: lint, unit tests, fuzzers, integration tests, tests on emulated persistent memory.
	@tools/phases deps tools build 'lint test-unit fuzz / test-integration $(if $(filter no,$(PMEM)),,test-pmem)'

# With the race detector where it sees anything: not in packages without a goroutine, nor in what of unpack computes for
# minutes with it in one goroutine, or in those of the other tests.
PURE := cmd/internal/config hif/parts hif/plan hif/static placement snapshotter/cri
.PHONY: test-unit
test-unit: ## Run the unit tests, with the race detector where it sees anything (root: they mount).
	go test $(addprefix ./,$(PURE)) ./snapshotter/unpack ./scmlib/...
	go test -race $$(go list ./... | grep -v -e /scmlib -e /snapshotter/unpack $(PURE:%=-e /nhybrid/%$$))
	go test -race -short -skip 'Bounded|TestBombs|TestRootPath|TestSameAsContainerd|TestTarReader' ./snapshotter/unpack

.PHONY: fuzz
FUZZTIME ?= 20s
fuzz: ## Run each fuzz target for FUZZTIME (20s), two at a time.
	@tools/fuzz $(FUZZTIME)

.PHONY: test-c
test-c: ## Run the tests of libscm and libscm_preload (needs gcc; redis-server, groff, g++ and pkg-config where they are).
	@tools/deps gcc libc6-dev binutils
	SCM_TSAN=1 go test -count 1 -v ./scmlib/c

# Not hif/static and hif/parts: what has this tag there measures, on dozens of images that are built first (docs/hif.md).
# One package at a time: each starts machines of its own.
.PHONY: test-integration
test-integration: deps tools build ## Run the tests against real containerd, ctr, nerdctl and CRI (root).
	@tools/deps $(DEB_DEPLOY)
	go test -tags integration -count 1 -p 1 -timeout 20m ./integration/... ./scmlib/region/ctrd

# Cycles of the campaign of which test-integration runs a few. A seed that is printed repeats it: NHYBRID_SEED.
CYCLES ?= 200
CUTS   ?= 100
.PHONY: test-faults
test-faults: deps tools build ## Kill the daemon CYCLES times and cut the power CUTS times at random moments of pulls; figures go to out/faults.json (root).
	NHYBRID_KILL_CYCLES=$(CYCLES) NHYBRID_POWER_CUTS=$(CUTS) NHYBRID_FAULTS_OUT=$(OUT) \
	  go test -tags integration -count 1 -timeout 3h -v -run '^TestFaults$$' ./integration

.PHONY: test-pmem
test-pmem: ## Run containerd with nhybrid in a QEMU guest with emulated persistent memory.
	./integration/pmem/run.sh

.PHONY: test-arm64
test-arm64: ## Build scmlib and libscm for arm64, and run them by qemu-user (make test does what needs no more packages).
	@tools/deps gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
	NHYBRID_ARM64=1 go test -tags integration -count 1 -v ./integration/arm64

## What is shown ---------------------------------------------------------------------------------------------------

.PHONY: demo
demo: deps $(if $(KEEP),tools,tools-core) build ## Pull and run an image on two tiers and show what went where (KEEP=1: leave it running).
	go run ./integration/demo

.PHONY: demo-clean
demo-clean: ## Take down what make demo KEEP=1 has left.
	go run ./integration/demo -clean

.PHONY: bench
bench: bench-deploy bench-hif bench-scm ## Run every benchmark; figures go to out/NAME.json.

.PHONY: bench-deploy
bench-deploy: deps tools build ## Measure deployment against the overlayfs snapshotter.
	@tools/deps $(DEB_DEPLOY)
	go run ./integration/bench deploy

.PHONY: bench-hif
bench-hif: deps tools build ## Measure hot image files: NVM saved, second cold starts, traces, profiles.
	go run ./integration/bench hif --svg docs/nvm-occupancy.svg

.PHONY: bench-scm
bench-scm: deps tools build ## Measure persistent memory in containers: the paper's figures, PMDK, bbolt, SQLite, Redis, crash tests.
	@tools/deps $(DEB_SCM)
	go run ./integration/bench scm --svg docs/scm-bench.svg

.PHONY: clean
clean: ## Remove bin/ and out/, the image cache in it included.
	rm -rf $(BIN) $(OUT)
