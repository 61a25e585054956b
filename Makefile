# Two commands do everything, set-up included: `make demo` (ENGINE=vllm or sglang) and `make test`.
SHELL := /bin/bash
ENGINE ?= vllm
QUICKTHAW_HOME ?= $(HOME)/.cache/quickthaw
export QUICKTHAW_HOME
# Tests start hundreds of Python processes; each module is compiled once.
unexport PYTHONDONTWRITEBYTECODE
PYTHON := $(QUICKTHAW_HOME)/venvs/project/bin/python
PYTEST := $(PYTHON) -m pytest -q
# CI asks for reports, to count that the engine tests ran.
REPORT = $(if $(QUICKTHAW_TEST_REPORT),--junitxml=$(QUICKTHAW_TEST_REPORT)/$(1).xml)

.PHONY: demo test test-fast lint check setup setup-fast bench bench-gpu wheels image image-test clean

demo:
	@setup/setup.sh $(ENGINE)
	@$(PYTHON) -m plugin demo --engine $(ENGINE)

setup:
	@setup/setup.sh vllm sglang

setup-fast:
	@setup/setup.sh

test: setup
	@setup/system.sh test-packages.txt
	@setup/kubernetes.sh || echo "no helm: the tests of the chart are skipped" >&2
	# A test that fails while two workers keep the machine busy is run once more, alone; a second failure counts.
	$(PYTEST) $(call REPORT,parts) -n 2 --dist loadgroup tests/t0 tests/t1 tests/cluster || $(PYTEST) $(call REPORT,parts-again) --last-failed tests/t0 tests/t1 tests/cluster
	$(PYTEST) $(call REPORT,engines) tests/t2 tests/gpu || $(PYTEST) $(call REPORT,engines-again) --last-failed tests/t2 tests/gpu

# Three workers for two cores: a third of the tests' time is waiting, for a disk or a time limit.
test-fast: setup-fast
	@$(PYTEST) -n 3 --dist loadgroup -m "not slow" tests/t0 tests/t1

lint: setup-fast
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

check: lint test

bench: setup
	$(PYTHON) -m plugin bench coldstart --engine $(ENGINE) --runs 5

# build/gpu/ENGINE: all that `benchmarks/gpu.py run` needs on a machine with a GPU and no network (docs/gpu.md).
bench-gpu: setup
	$(PYTHON) benchmarks/gpu.py prepare --engine $(ENGINE)

# dist/quickthaw-*.whl and dist/quickthaw_criu-*.whl, which brings CRIU to hosts that have none.
wheels: setup-fast
	@$(PYTHON) setup/wheels.py dist

# An image of the engine's image BASE with quickthaw in it (docs/deploy.md).
CONTAINER ?= $(firstword $(notdir $(shell command -v podman docker)) docker)
IMAGE ?= quickthaw-$(ENGINE)
IMAGE_ARGS = BASE=$(BASE) ENGINE=$(ENGINE) $(foreach name,PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_NO_INDEX,$(if $($(name)),$(name)=$($(name))))
image:
	@[ -n "$(BASE)" ] || { echo "image: give the engine's image: make image BASE=vllm/vllm-openai:v0.32.0 ENGINE=vllm" >&2; exit 2; }
	@case "$(ENGINE)" in vllm | sglang) ;; *) echo "image: ENGINE is vllm or sglang, not $(ENGINE)" >&2; exit 2 ;; esac
	@$(MAKE) --no-print-directory wheels
	$(CONTAINER) build -f deploy/container/Containerfile $(addprefix --build-arg ,$(IMAGE_ARGS)) --build-arg PYTHONS="$(PYTHONS)" -t $(IMAGE) .

# Builds an image and runs it in real containers, and the chart's pods, with the engine's double.
image-test: setup-fast
	@setup/system.sh test-packages.txt
	@setup/kubernetes.sh || echo "no helm: the tests of the chart are skipped" >&2
	$(PYTEST) tests/t1/deploy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
