# `make` alone lists the targets: those with words after "##".

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help
.NOTPARALLEL:

VERSION  ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),unknown)
IMAGE    ?= csi-driver:$(VERSION)
FUZZTIME ?= 20s

MODULES := . tests/e2e tests/sanity tools tools/manifests
LINT    := go tool -modfile=$(CURDIR)/tools/go.mod golangci-lint run --config=$(CURDIR)/.golangci.yml

.PHONY: help
help:
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Build and run

.PHONY: build
build: need-go ## Build bin/csi-driver, a static binary
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/csi-driver ./cmd/csi-driver

.PHONY: demo
demo: need-root need-filesystems build ## Provision, mount, snapshot, clone and grow on this machine; leaves nothing behind
	@go run ./demo

.PHONY: image
image: need-root need-go ## Build the container image, without a registry if there is none
	@scripts/install buildah
	@scripts/image $(IMAGE) $(VERSION)

.PHONY: bench
bench: need-root need-filesystems build ## Measure, and write docs/benchmarks.md; QUICK=1 is the short form, which does not (root)
	@scripts/install fio
	go run ./tests/bench/report $(if $(QUICK),-quick,-docs docs)

.PHONY: bench-compare
bench-compare: need-root need-filesystems ## Benchmarks of BASE=commit and of this checkout in turns; BENCH selects, COUNT=6 rounds (root)
	@scripts/install fio
	@scripts/bench-compare '$(or $(BASE),HEAD)' '$(or $(BENCH),Call/volumes=1000/.*/inflight=1$$$$)' '$(or $(COUNT),6)'

.PHONY: clean
clean: ## Remove what was built here
	rm -rf bin

##@ Test

.PHONY: test
test: need-root test-unit test-integration test-sanity ## All tests: unit, integration and sanity (root)

.PHONY: test-unit
test-unit: need-go ## Tests that need no privilege
	@scripts/install gcc
	go test -race ./...

.PHONY: test-integration
test-integration: need-root need-filesystems ## Tests on the kernel's loop devices and filesystems (root)
	@scripts/install gcc ip
	go test -race -tags integration -count=1 -timeout 40m -skip '^TestRouterPassesTheSuite$$' ./pkg/... ./examples/... ./tests/integration/... ./tests/crash/... ./tests/chaos/...

.PHONY: test-router
test-router: need-root need-filesystems ## The integration tests a second time, each through a router over three nodes (root)
	@scripts/install gcc ip
	go test -race -tags integration -count=1 -timeout 60m -run '^TestRouterPassesTheSuite$$' -v ./tests/integration

.PHONY: crash
crash: need-root need-filesystems ## Kill the driver, and have the power fail, at every point of every operation; test-integration does so at some (root)
	@scripts/install gcc
	ORLOP_CRASH_EVERY=1 go test -race -tags integration -count=1 -timeout 90m -v ./tests/crash

.PHONY: chaos
chaos: need-root need-filesystems ## Random operations and kills, compared with a model, for DURATION (5m); SEED= plans the same again (root)
	@scripts/install gcc
	@mkdir -p bin
	ORLOP_CHAOS_DURATION=$(or $(DURATION),5m) ORLOP_CHAOS_SEED=$(SEED) go test -race -tags integration -count=1 -timeout 0 -v -artifacts -outputdir=bin ./tests/chaos/...

.PHONY: test-vm
test-vm: need-root ## Integration tests on Linux 6.1 in an emulated machine; VM='./pkg/loop -run Detach' selects (root, slow)
	@scripts/vm $(VM)

.PHONY: test-sanity
test-sanity: need-root need-filesystems ## The upstream csi-sanity suite against the standalone driver (root)
	@cd tests/sanity && go test

.PHONY: e2e
e2e: need-cluster ## Tests on a Kubernetes of three nodes; FOCUS=TestX selects, KEEP=1 keeps the cluster (root)
	@scripts/e2e '$(or $(FOCUS),.)'

.PHONY: e2e-smoke
e2e-smoke: need-cluster ## The short ones of e2e (root)
	@scripts/e2e '^TestSmoke'

.PHONY: e2e-upstream
e2e-upstream: need-cluster ## Kubernetes' own storage suite there; FOCUS=snapshot selects by name, KEEP=1 as above (root)
	@scripts/e2e --upstream '$(FOCUS)'

.PHONY: fuzz
fuzz: need-go ## Run every fuzz target for FUZZTIME (20s) each
	@scripts/fuzz $(FUZZTIME)

##@ Kubernetes on this machine

.PHONY: cluster-up
cluster-up: need-cluster ## Start a Kubernetes of three nodes with Orlop on it, and tell how to use it (root)
	@cd tests/e2e && go run ./cmd/cluster up

.PHONY: cluster-update
cluster-update: need-cluster ## Make it run the driver and the manifests of this checkout (root)
	@cd tests/e2e && go run ./cmd/cluster update

.PHONY: cluster-down
cluster-down: need-cluster ## Stop it; leaves nothing behind (root)
	@cd tests/e2e && go run ./cmd/cluster down

##@ Check

.PHONY: lint
lint: need-go ## Run golangci-lint on the driver and its tests
	$(LINT) ./...
	cd tests/sanity && $(LINT) ./...
	cd tests/e2e && $(LINT) ./...
	cd tools/manifests && $(LINT) ./...

.PHONY: fmt
fmt: need-go ## Format the Go code
	gofmt -s -w cmd demo examples pkg tests tools

.PHONY: update
update: fmt ## Regenerate what is generated: pkg/peerapi, go.mod and go.sum, docs/reference.md, deploy/kubernetes/base
	@scripts/install protoc
	@scripts/generate
	@for module in $(MODULES); do (cd $$module && go mod tidy); done
	@reference=$$(go run ./cmd/csi-driver reference) && echo "$$reference" >docs/reference.md
	@cd tools/manifests && go run .

.PHONY: verify
verify: lint ## Fail if `make update` would change anything, or a linter finds something
	@scripts/install shellcheck
	shellcheck .ci/run scripts/*
	@scripts/verify
	cd tools/manifests && go test -count=1 ./...

# What the targets above need.

.PHONY: need-go need-root need-filesystems need-cluster
need-go:
	@scripts/install go

need-root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS) needs root: it makes loop devices and mounts" >&2; exit 1; }

need-filesystems: need-go
	@scripts/install mkfs.ext4 mkfs.xfs mkfs.btrfs

need-cluster: need-root need-go
	@scripts/install buildah ip iptables nsenter runc /usr/lib/cni/ptp
