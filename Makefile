# Everything a contributor or a curious user runs. `make help` lists it; each target installs what it needs.

ARGS ?=
FUZZ_SECONDS ?= 60

.PHONY: help setup demo test test-fast test-kernel torture torture-native fuzz compare bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: ## install packages, the Python environment and the kernel for the virtual machine
	@tools/setup dev vm

demo: ## the main job, shown: an image becomes a disk with a file system, is checked and measured, and goes again
	@tools/setup dev vm
	@tools/demo

test: ## all tests; the last line counts them
	@tools/setup dev vm libblkio
	@tools/test $(ARGS)

test-fast: ## what needs no virtual machine, under 3 minutes
	@tools/setup dev
	@tools/test --fast $(ARGS)

test-kernel: ## the tests on a real VDUSE kernel, in the virtual machine (HOST=1: on this host's own); ARGS='-k resize'
	@tools/setup dev vm
	@HOST=$(HOST) tools/test kernel $(ARGS)

torture: ## kill servers under fio, KILLS=200 times, on a VDUSE kernel; SEED=n repeats a run, PEER=1 shows qemu-storage-daemon's
	@tools/setup dev vm
	@KILLS=$(KILLS) SEED=$(SEED) PEER=$(PEER) HOST=$(HOST) tests/torture/run vm

torture-native: ## the same over vhost-user, without a virtual machine, KILLS=2000 times
	@tools/setup dev
	@KILLS=$(KILLS) SEED=$(SEED) PEER=$(PEER) tests/torture/run native

fuzz: ## search for crashes in the C core for FUZZ_SECONDS
	@tools/setup dev fuzz
	@tests/fuzz/run search $(FUZZ_SECONDS)

compare: ## speed against qemu-storage-daemon, in the same virtual machine; results in bench/results
	@tools/setup dev vm
	@bench/compare $(ARGS)

bench: ## speed of the vhost-user export against qemu-storage-daemon, natively; results in bench/results
	@tools/setup dev vm libblkio
	@bench/native $(ARGS)

clean: ## remove what was built, but not downloads
	rm -rf build dist .venv .vm *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find pyvduse vduse_blk -name '*.so' -delete
