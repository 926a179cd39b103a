# make demo and make test work on a fresh Debian machine; both begin with setup.
.PHONY: setup demo test check bench bench-swarm bench-sim soak format clean csi-stubs bench-io manifests image
PYTHON := .venv/bin/python
REGISTRY ?= docker
KILLS ?= 200
SEED ?= 1

setup:
	@scripts/setup.sh

demo: setup
	@$(PYTHON) scripts/demo.py --registry $(REGISTRY)

test: setup
	@scripts/test.sh

# Format, lint, types, architecture and the fast tests: under a minute.
check: setup
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -q -m "not io and not mount and not e2e"

bench: setup
	@$(PYTHON) -m benchmarks

# The data path in every mode of mount, against the local disk and against fetching without a mount.
bench-io: setup
	@$(PYTHON) -m benchmarks.io

# Nodes in network namespaces; needs root.
bench-swarm: setup
	@$(PYTHON) -m benchmarks.swarm

# What the driver speaks, made from the interface's own definition; needs Go.
csi-stubs: setup
	@scripts/csi_stubs.sh

# The plain manifests, made from the chart; needs Go.
manifests:
	@scripts/manifests.sh

# Builds the Dockerfile and runs daemon, holder and driver of the image by runc; needs root, buildah, mmdebstrap, runc and the network.
image: setup
	@RAFS_TEST_IMAGE=1 $(PYTHON) -m pytest -q -o faulthandler_timeout=1800 tests/deploy/test_image.py --durations=3

# Swarms of hundreds and thousands of nodes, simulated.
bench-sim: setup
	@$(PYTHON) -m benchmarks.swarm_sim

# Kills of every process of a node in each mode, under readers; needs root, takes long.
soak: setup
	@for mode in erofs lazy kernel fuse; do $(PYTHON) -m tests.soak.kills --mode $$mode --kills $(KILLS) --seed $(SEED) || exit 1; done

format: setup
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

clean:
	@rm -rf .venv .demo build *.egg-info .mypy_cache .ruff_cache .hypothesis
