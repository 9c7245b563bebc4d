# `make demo` and `make test` set everything up by themselves; nothing else is needed.
# The environment is rebuilt only when the pins or the package's description change.

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
BIN := $(VENV)/bin
comma := ,
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CLIP := cache/demo/bikes.mp4

# What jax computes on: cpu, cuda (drivers 580 and newer), cuda12 (older ones) or tpu. A GPU is taken when there is one
# that works; `make demo ACCELERATOR=cpu` does without, and a TPU has to be named.
ifndef ACCELERATOR
ACCELERATOR := $(shell \
	if version=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then \
		if [ "$${version%%.*}" -ge 580 ]; then echo cuda; else echo cuda12; fi; \
	else echo cpu; fi)
endif
ifeq ($(filter $(ACCELERATOR),cpu cuda cuda12 tpu),)
$(error ACCELERATOR is $(ACCELERATOR); it must be cpu, cuda, cuda12 or tpu)
endif

.PHONY: demo evidence-small test test-long test-tpu test-slow test-gpu test-wheel lint types pictures docs setup clean
setup: $(VENV)/ready $(VENV)/$(ACCELERATOR)

$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v[0]}.{v[1]} is too old: jax needs 3.12 or newer; name one with  make PYTHON=python3.12 $(MAKECMDGOALS)" if v < (3, 12) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps -e .
	touch $@

# What tests, lint and types need besides.
$(VENV)/dev: requirements-dev.lock $(VENV)/ready
	$(PIP) --no-deps -r requirements-dev.lock
	touch $@

$(VENV)/cpu: $(VENV)/ready
	touch $@

$(VENV)/cuda $(VENV)/cuda12 $(VENV)/tpu: $(VENV)/%: requirements-%.lock $(VENV)/ready
	$(PIP) --no-deps -r requirements-$*.lock
	touch $@

$(CLIP): $(VENV)/ready
	$(BIN)/python -m moc_jax.data.demo_clip $(dir $@)

# An accelerator that was found or named must work: jax would take the processor without a word.
demo: export JAX_PLATFORMS ?= $(patsubst cuda12,cuda,$(ACCELERATOR))$(if $(filter-out cpu,$(ACCELERATOR)),$(comma)cpu)
# Large pages: every step takes and returns the same 200 MB, and half the kernel's time for that goes away.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(CLIP) $(VENV)/$(ACCELERATOR)
	$(BIN)/moc-train --config demo
	$(BIN)/moc-sample --checkpoint out/demo --training-scene 0 --overwrite --out out/demo/sample.mp4 \
		--contact-sheet out/demo/contact_sheet.png --routing-picture out/demo/routing.png

# Recall, learned in minutes on the processor; see docs/evidence.md.
evidence-small: $(VENV)/ready
	$(BIN)/python -m evidence.small

# Tests of a file share what they compiled. On two cores no other plan was faster.
test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# What takes longest; CI runs it too.
test-long: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'long and not slow'

# Kernels and programs of real sizes by the compiler for TPUs, which exists for x86-64; no TPU is needed.
test-tpu: $(VENV)/tpu $(VENV)/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 2 -m 'tpu_compiler and not slow'

# On a Hopper GPU, with the jax that is installed there: `make test-gpu BIN=/usr/bin` takes the machine's Python.
# Compiling takes the time, some four minutes on 16 cores. TPU kernels are interpreted, which `make test` does.
test-gpu:
	MOC_TEST_PLATFORM=gpu $(BIN)/python3 -m pytest -n 16 tests/attention \
		--ignore tests/attention/pallas_tpu -m 'not slow and not tpu_compiler'

# The wheel as a stranger gets it: in an empty environment, first alone, then with the extra that the programs need.
test-wheel: $(VENV)/dev
	PYTHON="$(PYTHON)" .ci/wheel $(BIN)/python

test-slow: $(VENV)/tpu $(VENV)/dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/pyrefly check

# The documentation's pictures.
pictures: $(VENV)/ready
	JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python docs/pictures/draw.py

# The documentation as a site in out/site; its tools need nothing of the package, so they have an environment of their own.
$(DOCS_VENV)/ready: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.lock
	touch $@

docs: $(DOCS_VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DOCS_VENV) out cache
