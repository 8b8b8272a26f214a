# Build, test and try bpfgate. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
.PHONY: all build bpf deps machine-deps install uninstall deb test systemd-test vm-test stage demo bench fuzz soak attack attack-table reference caps-table lint clean help

# rustup puts cargo where a shell finds it only after the next login.
ifndef CARGO
CARGO := $(or $(shell command -v cargo),$(wildcard $(HOME)/.cargo/bin/cargo),cargo)
endif
CLANG ?= clang

# Tests and demo look for the binaries under target/, whatever the user's own setting is.
export CARGO_TARGET_DIR := $(CURDIR)/target

# One package per line, with its reason. Names hold for Debian 12, Debian 13 and Ubuntu.
PACKAGES := clang        # compiles the BPF objects
PACKAGES += gcc          # links Rust programs, compiles the libbpf of the loader
PACKAGES += libc6-dev    # headers and start files for it, and linux/*.h for the BPF objects
PACKAGES += libbpf-dev   # bpf/bpf_helpers.h for the BPF objects
PACKAGES += libelf-dev   # libbpf reads ELF with it
PACKAGES += zlib1g-dev   # libelf needs it
PACKAGES += pkg-config   # finds both
PACKAGES += make         # builds libbpf
PACKAGES += iproute2     # ip, for demo and tests
PACKAGES += iputils-ping # ping, for the demo
PACKAGES += python3      # the plain client of the tests
PACKAGES += systemd      # systemd-analyze, for the tests of the units; it need not run
PACKAGES += strace       # system calls of the programs under test, and failures of them
PACKAGES += dpkg-dev     # dpkg-shlibdeps, for the dependencies of the package
PACKAGES := $(strip $(PACKAGES))

# What the machines of `make systemd-test` and `make vm-test` need beside that.
MACHINE_PACKAGES := systemd-container         # systemd-nspawn
MACHINE_PACKAGES += mmdebstrap                # makes Debian trees
MACHINE_PACKAGES += debian-archive-keyring    # signs what goes in there
VM_PACKAGES := qemu-system-x86                # emulates them; for an old one, tests/machines/qemu unpacks a newer
VM_PACKAGES += e2fsprogs squashfs-tools cpio  # makes their disks
VM_PACKAGES += kmod xz-utils zstd             # unpacks their kernels and modules
MACHINE_PACKAGES := $(strip $(MACHINE_PACKAGES))
VM_PACKAGES := $(strip $(VM_PACKAGES))

BPF_SOURCES := $(wildcard policies/bpf/*.bpf.c tests/bpf/*.bpf.c)
BPF_HEADERS := $(wildcard tests/bpf/*.bpf.h)
BPF_OBJECTS := $(patsubst %.bpf.c,target/bpf/%.bpf.o,$(notdir $(BPF_SOURCES)))
BPF_ARCH := $(shell uname -m | sed 's/x86_64/x86/; s/aarch64/arm64/; s/riscv64/riscv/; s/s390x/s390/; s/ppc64.*/powerpc/')
# asm/types.h is in the directory of the architecture on Debian. The paths in the debugging
# information are relative, so that an object has the same digest wherever it is built.
# Looked up when used (=), because gcc may be installed by `deps` only just before.
BPF_FLAGS = -target bpf -O2 -g -Wall -Wextra -Wno-unused-parameter -Werror -D__TARGET_ARCH_$(BPF_ARCH) \
  -idirafter /usr/include/$(shell gcc -print-multiarch) -ffile-prefix-map=$(CURDIR)=.

all: build ## The same as build

build: deps bpf ## Release binaries and BPF objects
	$(CARGO) build --release --locked --workspace --exclude bpfgate-helper --bins --examples
	# Without a dynamic linker the helper starts sooner and is smaller; the others need the libelf of the system.
	$(CARGO) rustc --release --locked -p bpfgate-helper --bin bpfgate-helper -- -C target-feature=+crt-static

bpf: $(BPF_OBJECTS) ## The BPF objects of examples and tests, as target/bpf/NAME.bpf.o

vpath %.bpf.c policies/bpf tests/bpf
target/bpf/%.bpf.o: %.bpf.c $(BPF_HEADERS) Makefile | deps
	@mkdir -p $(@D)
	$(CLANG) $(BPF_FLAGS) -c $< -o $@

deps: ## Install what is missing to build and test (apt; Debian 12, 13, Ubuntu)
	@$(call install_packages,$(PACKAGES),clang gcc pkg-config ip ping python3 strace)
	@command -v $(CARGO) >/dev/null || { echo "make deps: Rust is missing; https://rustup.rs tells how to install it" >&2; exit 1; }

machine-deps: deps
	@$(call install_packages,$(MACHINE_PACKAGES),systemd-nspawn mmdebstrap)

# $(1): packages; $(2): commands that tell, where there is no dpkg, whether they are there.
define install_packages
missing=; \
if command -v dpkg-query >/dev/null; then \
  have=" $$(dpkg-query -W -f='$${db:Status-Status}=$${Package} ' $(1) 2>/dev/null || true)"; \
  for p in $(1); do [[ $$have == *" installed=$$p "* ]] || missing+=" $$p"; done; \
else \
  for c in $(2); do command -v $$c >/dev/null || missing+=" $$c"; done; \
fi; \
if [[ -n $$missing ]]; then \
  if ! command -v apt-get >/dev/null; then \
    echo "make deps: please install:$$missing (on Debian the packages are: $(1))" >&2; exit 1; \
  fi; \
  root=; \
  if [[ $$(id -u) != 0 ]]; then \
    if ! command -v sudo >/dev/null; then \
      echo "make deps: sudo is missing; as root, run: apt-get install$$missing" >&2; exit 1; \
    fi; \
    root=sudo; \
  fi; \
  echo "make deps: installing$$missing"; \
  $$root apt-get update -q; \
  $$root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
fi
endef

# Where to install. systemd looks for units and generators in /usr and /usr/local only. DESTDIR goes before everything
# and is meant for packages.
PREFIX ?= /usr/local
DESTDIR ?=
STRIP ?=
BIN = $(DESTDIR)$(PREFIX)/bin
LIB = $(DESTDIR)$(PREFIX)/lib
LIBEXEC = $(DESTDIR)$(PREFIX)/libexec/bpfgate
DOC = $(DESTDIR)$(PREFIX)/share/doc/bpfgate
PROGRAMS := bpfgate-broker bpfgate-helper bpfgate-loader
UNITS := $(notdir $(wildcard systemd/units/*))
EXAMPLES := $(patsubst policies/bpf/%.bpf.c,target/bpf/%.bpf.o,$(wildcard policies/bpf/*.bpf.c))
RUNNING = [[ -z "$(DESTDIR)" && -d /run/systemd/system ]]

install: ## Install below PREFIX (/usr/local, or /usr) and DESTDIR what `make build` built
	@[[ "$(PREFIX)" == /usr || "$(PREFIX)" == /usr/local ]] || \
	  { echo "make install: PREFIX is $(PREFIX), but systemd finds units only in /usr and /usr/local" >&2; exit 1; }
	@[[ -x target/release/bpfgate-generator && -e target/bpf/packet_counter.bpf.o ]] || \
	  { echo "make install: nothing is built yet; run make build first, which needs no root" >&2; exit 1; }
	install -d $(BIN) $(LIBEXEC) $(LIB)/systemd/system $(LIB)/systemd/system-generators $(LIB)/sysusers.d $(LIB)/tmpfiles.d \
	  $(LIB)/bpfgate $(DOC)/examples/bpf $(DESTDIR)/etc/bpfgate/policies
	install $(STRIP) target/release/bpfgate $(BIN)
	install $(STRIP) $(PROGRAMS:%=target/release/%) $(LIBEXEC)
	install $(STRIP) target/release/bpfgate-generator $(LIB)/systemd/system-generators
	install -m 644 $(EXAMPLES) $(LIB)/bpfgate
	# Policies of packages are looked for in /usr/lib only. The broker is allowed directories that are there when it starts.
	[[ $(PREFIX) != /usr ]] || install -D -m 644 systemd/policies-of-packages $(LIB)/bpfgate/policies/README
	install -m 644 systemd/sysusers.d/bpfgate.conf $(LIB)/sysusers.d
	install -m 644 systemd/tmpfiles.d/bpfgate.conf $(LIB)/tmpfiles.d
	for unit in $(UNITS); do \
	  sed 's,/usr/libexec,$(PREFIX)/libexec,g' systemd/units/$$unit > $(LIB)/systemd/system/$$unit; \
	  chmod 644 $(LIB)/systemd/system/$$unit; \
	done
	install -m 644 README.md $(DOC)
	install -m 644 policies/README.md $(DOC)/policies.md
	install -m 644 policies/policy.schema.json $(DOC)
	install -m 644 systemd/README.md $(DOC)/systemd.md
	install -m 644 docs/*.md $(DOC)
	install -m 644 policies/bpf/*.bpf.c $(DOC)/examples/bpf
	for policy in policies/*.toml; do \
	  systemd/shipped-policy $$policy $(PREFIX) open > $(DOC)/examples/$${policy##*/}; \
	  chmod 644 $(DOC)/examples/$${policy##*/}; \
	done
	# In force as they are. Policies of packages are read in /usr/lib only; elsewhere one is the administrator's own, once
	# it is there, and keeps all but the digest.
	for policy in policies/shipped/*.toml; do \
	  if [[ $(PREFIX) == /usr ]]; then installed=$(LIB)/bpfgate/policies/$${policy##*/}; \
	  else installed=$(DESTDIR)/etc/bpfgate/policies/$${policy##*/}; fi; \
	  if [[ $(PREFIX) != /usr && -e $$installed ]]; then \
	    target/release/bpfgate policy pin --objects target/bpf $$installed; \
	  else \
	    systemd/shipped-policy $$policy $(PREFIX) shipped > $$installed; chmod 644 $$installed; \
	  fi; \
	done
	# The administrator's own, once it is there.
	policy=$(DESTDIR)/etc/bpfgate/policies/packet-counter.toml; \
	if [[ ! -e $$policy ]]; then \
	  systemd/shipped-policy policies/packet-counter.toml $(PREFIX) closed > $$policy; chmod 644 $$policy; \
	fi
	@if $(RUNNING); then printf '%s\n' '' 'make install: done. To run it:' \
	  '  systemd-sysusers && systemd-tmpfiles --create' \
	  '  systemctl daemon-reload' \
	  '  systemctl enable --now bpfgate.socket bpfgate-admin.socket' \
	  '  bpfgate policy apply'; fi

uninstall: ## Stop and remove what `make install` installed; policies and accounts stay
	if $(RUNNING); then \
	  systemctl disable --now bpfgate.socket bpfgate-admin.socket || true; \
	  systemctl stop bpfgate.service 'bpfgate-helper@*.socket' 'bpfgate-helper@*.service' || true; \
	fi
	rm -f $(BIN)/bpfgate $(LIB)/systemd/system-generators/bpfgate-generator
	rm -f $(UNITS:%=$(LIB)/systemd/system/%) $(LIB)/sysusers.d/bpfgate.conf $(LIB)/tmpfiles.d/bpfgate.conf
	rm -f $(EXAMPLES:target/bpf/%=$(LIB)/bpfgate/%)
	rm -rf $(LIBEXEC) $(DOC) $(LIB)/bpfgate/policies/README
	rm -f $(patsubst policies/shipped/%,$(LIB)/bpfgate/policies/%,$(wildcard policies/shipped/*.toml))
	rmdir --ignore-fail-on-non-empty $(LIB)/bpfgate/policies $(LIB)/bpfgate 2>/dev/null || true
	if $(RUNNING); then systemctl daemon-reload; rm -rf /run/bpfgate; fi

# The version is pinned: a package should not change because a tool did.
CARGO_DEB := target/tools/bin/cargo-deb
CARGO_DEB_VERSION := 3.8.0
$(CARGO_DEB): Makefile | deps
	$(CARGO) install --locked --version $(CARGO_DEB_VERSION) --no-default-features --root target/tools --target-dir target/tools/build cargo-deb
	touch $@

deb: build $(CARGO_DEB) ## The Debian package, as target/debian/bpfgate_VERSION_ARCH.deb
	rm -rf target/package target/debian
	$(MAKE) --no-print-directory install PREFIX=/usr DESTDIR=$(CURDIR)/target/package STRIP=-s
	cd systemd && ../$(CARGO_DEB) deb --quiet --no-build --no-strip --output $(CURDIR)/target/debian/
	dpkg-deb --info target/debian/bpfgate_*.deb | sed -n 's/^ \(Package\|Version\|Depends\|Installed-Size\):/&/p'

test: SHOWN = --show-output 2>&1 | tee -a target/test.log
test: build ## All tests; as root those too that load BPF programs
	@: > target/test.log
	$(CARGO) test --locked --workspace --exclude bpfgate-tests -- $(SHOWN)
	RUST_TEST_THREADS=1 $(CARGO) test --locked -p bpfgate-tests -- $(SHOWN) # one at a time: they compare what the kernel holds
	@python3 tests/results.py target/test.log

# A tree of files for the machines; everything in it is built before.
stage: deb
	CARGO=$(CARGO) tests/machines/stage

systemd-test: machine-deps stage ## The tests of the services, under systemd 252 and 257 in containers (root)
	$(as_root) tests/machines/suites nspawn bookworm trixie

VM_KERNELS ?= 6.1 6.12 newest
vm-test: machine-deps stage ## All end-to-end tests under Debian kernels, emulated: an hour and more (root; VM_KERNELS="6.1 6.12 newest")
	@$(call install_packages,$(VM_PACKAGES),qemu-system-x86_64 mke2fs mksquashfs)
	$(as_root) tests/machines/suites vm $(VM_KERNELS)

as_root = $$([[ $$(id -u) == 0 ]] || echo sudo --preserve-env=CARGO_TARGET_DIR)

demo: build ## A packet counter without privilege, in a network namespace of its own (asks sudo once)
	tests/demo.sh

bench: build ## Measure what the privilege separation costs; writes target/bench.json (root; asks sudo once)
	@as_root=; if [[ $$(id -u) != 0 ]]; then as_root="sudo --preserve-env=BPFGATE_BIN_DIR"; fi; \
	$$as_root target/release/bench

# A nightly compiler is needed for this alone. The seeds are in the tree; what the fuzzer adds to them is not.
# Without a sanitizer, because it is safe Rust but for protocol/src/channel.rs: FUZZ_TARGETS=channel FUZZ_SANITIZER=address.
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard tests/fuzz/targets/*.rs)))
FUZZ_SANITIZER ?= none
FUZZ_SECONDS ?= 60
CARGO_FUZZ := target/tools/bin/cargo-fuzz
CARGO_FUZZ_VERSION := 0.13.2
$(CARGO_FUZZ): Makefile | deps
	$(CARGO) install --locked --version $(CARGO_FUZZ_VERSION) --root target/tools --target-dir target/tools/build cargo-fuzz
	touch $@

fuzz: $(CARGO_FUZZ) ## Fuzz everything that reads what others wrote, a minute each (FUZZ_SECONDS=60; nightly Rust)
	@export RUSTUP_TOOLCHAIN=nightly; options="--fuzz-dir tests/fuzz --target-dir target/fuzz/build --sanitizer $(FUZZ_SANITIZER)"; \
	$(CARGO_FUZZ) fuzz build $$options; \
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p target/fuzz/corpus/$$target; \
	  log=target/fuzz/$$target.log; \
	  $(CARGO_FUZZ) fuzz run $$options $$target target/fuzz/corpus/$$target tests/fuzz/seeds/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 -malloc_limit_mb=16 -print_final_stats=1 > $$log 2>&1 || \
	    { tail -n 40 $$log; echo "make fuzz: $$target has found something: the end of $$log is above" >&2; exit 1; }; \
	done; \
	awk -f tests/fuzz/table.awk $(FUZZ_TARGETS:%=target/fuzz/%.log)

attack: machine-deps stage ## Every attack of tests/attacks.md, in the long form: less than half an hour (root)
	@export CARGO=$(CARGO); as_root=; if [[ $$(id -u) != 0 ]]; then as_root="sudo --preserve-env=CARGO,HOME"; fi; \
	$$as_root tests/attack

attack-table: ## The same table, from what make test, systemd-test and vm-test left
	@tests/attack --look

soak: build ## Ten minutes of honest and rude clients, kills and floods, and what held (SOAK_SECONDS=600; root)
	@as_root=; if [[ $$(id -u) != 0 ]]; then as_root="sudo --preserve-env=SOAK_SECONDS,BPFGATE_BIN_DIR"; fi; \
	SOAK_SECONDS=$${SOAK_SECONDS:-600} $$as_root target/release/soak

reference: ## Write the tables of policies/README.md and the schema for editors from the types
	$(CARGO) test --locked -p bpfgate-policy-tests --test manual -- --quiet --ignored write

caps-table: build ## Write docs/capabilities.md: its tables as the running kernel has them, and its transcripts (root)
	$(CARGO) test --locked -p bpfgate-tests --test caps_need --test caps_guide -- --quiet --ignored write

lint: deps ## Formatting and clippy, without a warning
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

clean: ## Remove everything that was built
	rm -rf target

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
