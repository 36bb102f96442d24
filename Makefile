# baton: what there is to do here. `make` lists it.

GO       ?= go
CACHE    := $(CURDIR)/.cache
NESTED   := $(CACHE)/bin/nested
FUZZTIME ?= 3s
LIMIT    ?= 15m

# Packages that need the host under test, and those that this machine can test by itself.
# Some are both: here they meet this machine's KVM, if it has one, there kvm_amd and vhost-net.
# What takes minutes, or has not run beside the others for long, is for test-long; so are there
# the tests with tiny guests, where this machine's KVM has run them.
SUITES = $$($(GO) list ./tests/suites/... | grep -vE "/($(if $(BATON_LONG),,failover|hostile|hotplug|migrate|)hosts)$$") $(if $(BATON_LONG),./tests/l0 ./vmm,$(if $(wildcard /dev/kvm),,./tests/l0)) ./kvm/... ./devices/vhost/... ./devices/tap/... ./devices/virtio/net/...
LOCAL  = $$($(GO) list ./... | grep -vE '^baton/tests/(suites|bench)(/|$$)')

export CGO_ENABLED ?= 0
.DEFAULT_GOAL := help
.PHONY: help build install test test-long demo bench images lint fuzz nested clean \
	test-local test-images test-suites test-hosts FORCE

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r t d; do printf '  make %-10s %s\n' "$$t" "$$d"; done

build: ## build ./baton, static
	$(GO) build -trimpath -o baton .

test: ## all checks: lint, unit tests under the race detector, suites in the nested host, fuzz targets
	@start=$$(date +%s); \
	for stage in install lint test-local images test-images test-suites $(if $(BATON_LONG),$(if $(filter host,$(BATON_TEST)),,test-hosts)) fuzz; do \
		echo "== $$stage"; \
		$(MAKE) --no-print-directory $$stage || { echo "make test: FAILED in $$stage, see above"; exit 1; }; \
	done; \
	echo "make test: all is well: lint; $$(cat $(CACHE)/local.txt); $$(cat $(CACHE)/suites.txt); $$(cat $(CACHE)/fuzz.txt); $$(($$(date +%s) - start)) s"

test-long: ## the same with long fuzzing and the suites' long forms
	@BATON_LONG=1 $(MAKE) --no-print-directory test FUZZTIME=60s LIMIT=60m

demo: ## a stock Debian kernel on baton; guests with a VF move between two hosts' NICs, on baton and QEMU: demo.html
	@mkdir -p $(CACHE)/bin
	@$(GO) build -o $(CACHE)/bin/demo ./tests/demo
	@$(CACHE)/bin/demo

bench: $(NESTED) build images $(CACHE)/bin/gokvm ## compare with QEMU, in the nested host and, by a tiny guest, on this machine; RUN=TestLinux/disk: a part
	@cd guest-images && $(GO) build -o $(CACHE)/bin/nettool ./cmds/nettool
	@mkdir -p $(CACHE)/bench-here
	@[ -n "$(RUN)" ] || BATON_TEST=host BATON_ARTIFACTS=$(CACHE)/bench-here $(NESTED) run -run "TestExits|TestMigrateHere|TestMigrateGrowth" -json $(CACHE)/bench-here.json ./tests/bench
	@$(NESTED) run $(if $(RUN),-run '$(RUN)') -limit 60m -out $(CACHE)/bench -json $(CACHE)/bench.json ./tests/bench
	@cat $(if $(RUN),,$(CACHE)/bench-here/table.txt) $(CACHE)/bench/bench/table.txt

images: install ## build the guests' initramfs images into .cache/images
	@cd guest-images && $(GO) run . test demo
	@[ ! -d $(CACHE)/linux-6.1 ] || { cd guest-images && $(GO) run . -root $(CACHE)/linux-6.1 -o $(CACHE)/images/6.1 test; }

lint: install $(CACHE)/bin/staticcheck ## gofmt, vet, staticcheck, import arrows
	@files=$$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l); [ -z "$$files" ] || { echo "not formatted: $$files"; exit 1; }
	@$(GO) vet ./...
	@for m in guest-images tests/suites/control/goqemu; do (cd $$m && $(GO) vet ./...) || exit 1; done
	@$(CACHE)/bin/staticcheck ./...
	@cd guest-images && $(CACHE)/bin/staticcheck ./...
	@$(GO) test -count=1 ./tests/lint

# The go command now and then fails with nothing but its own deadline, when that comes while it
# looks at a new input: then it is asked again.
fuzz: ## run every fuzz target for FUZZTIME
	@n=0; for pkg in $$(git grep -lE '^func Fuzz' -- '*_test.go' | grep -v ^guest-images/ | xargs -n1 dirname | sort -u); do \
		for f in $$($(GO) test -list '^Fuzz' ./$$pkg | grep '^Fuzz'); do \
			echo "fuzz  $$pkg $$f"; \
			for try in 1 2 3; do \
				$(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x ./$$pkg > $(CACHE)/fuzz.log 2>&1 && break; \
				grep -q '^    context deadline exceeded' $(CACHE)/fuzz.log && ! grep -q 'Failing input' $(CACHE)/fuzz.log && [ $$try != 3 ] || { cat $(CACHE)/fuzz.log; exit 1; }; \
			done; \
			n=$$((n + 1)); \
		done; \
	done; echo "$$n fuzz targets ran for $(FUZZTIME) each" | tee $(CACHE)/fuzz.txt

nested: $(NESTED) build images ## a shell in the nested host
	@$(NESTED) shell

clean: ## remove what was built
	rm -rf $(CACHE) baton

install: $(NESTED)
	@$(NESTED) install

test-local: $(NESTED)
	@$(NESTED) local -limit $(LIMIT) -json $(CACHE)/local.json -summary $(CACHE)/local.txt $(LOCAL)

test-images:
	@cd guest-images && $(GO) test ./...

test-suites: $(NESTED)
	@$(NESTED) run -limit $(LIMIT) -json $(CACHE)/suites.json -summary $(CACHE)/suites.txt $(SUITES)

# Two nested hosts, between which a guest moves.
test-hosts: $(NESTED)
	@$(NESTED) run -hosts 2 -limit $(LIMIT) -json $(CACHE)/hosts.json ./tests/suites/hosts

# The go command knows what has changed.
$(NESTED): FORCE
	@mkdir -p $(@D)
	@$(GO) build -o $@ ./tests/nested

$(CACHE)/bin/gokvm: tools/go.mod
	@mkdir -p $(@D)
	@cd tools && $(GO) build -o $@ github.com/bobuhiro11/gokvm

$(CACHE)/bin/staticcheck: tools/go.mod
	@mkdir -p $(@D)
	@cd tools && $(GO) build -o $@ honnef.co/go/tools/cmd/staticcheck
