# Python 3.11 or newer and make are enough; the first run creates .venv with the versions of
# requirements.lock.
#
#   make demo                     pretrain on handwritten digits and say whether it learned
#   make test                     the test suite, once per backend
#   make lint / make format       ruff: check / mend
#   make clean                    remove .venv and what the commands wrote
#
# Variables, with examples:
#   BACKEND=torch                 of the demo: tensorflow (default), torch or jax
#   ARGS="--help"                 for the demo's script
#   BACKENDS="torch jax"          of the tests, one after the other
#   PYTEST_ARGS="tests/test_losses.py -k koleo"
#   WORKERS=1                     processes that share the tests of a backend
#   PYTHON=python3.12             makes .venv
#   TORCH_INDEX=...               where torch comes from, see below

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

PYTHON ?= python3
# Keras Hub needs TensorFlow in any case, so this backend adds nothing to the install.
BACKEND ?= tensorflow
BACKENDS ?= torch jax tensorflow
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count()))")

# PyPI's Linux build of torch brings several GB of CUDA, which neither command needs. This index
# has the CPU build; for the GPU: `make demo BACKEND=torch TORCH_INDEX=https://pypi.org/simple`.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
# -qq: errors only.
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install -qq -c requirements.lock
INSTALL_TORCH := $(INSTALL) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch
INSTALL_PROJECT := $(INSTALL) --build-constraint requirements.lock -e
# The user's own ~/.keras/keras.json must not change what runs here.
RUN := TF_CPP_MIN_LOG_LEVEL=3 MPLBACKEND=Agg KERAS_HOME=$(VENV)/keras

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# One stamp file per set of packages, touched last: an interrupted install is repeated, and changed
# versions or dependencies are installed.
PINS := pyproject.toml requirements.lock Makefile

$(VENV)/.created: | $(PINS)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is \
	needed. Received: " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo-%: $(PINS) | $(VENV)/.created
	@echo "Installing Keras and the $* backend in $(VENV): once, a few minutes."
	@$(INSTALL) --upgrade pip
	@$(if $(filter torch,$*),$(INSTALL_TORCH))
	@$(INSTALL_PROJECT) ".[$*,plots]" scikit-learn
	@touch $@

$(VENV)/.test: $(PINS) | $(VENV)/.created
	@echo "Installing the three backends and the test tools in $(VENV): once, a few minutes."
	@$(INSTALL) --upgrade pip
	@$(INSTALL_TORCH)
	@$(INSTALL_PROJECT) ".[torch,jax,tensorflow,plots,keras-cv,dev]"
	@touch $@

$(VENV)/.lint: $(PINS) | $(VENV)/.created
	@$(INSTALL) ruff
	@touch $@

ifeq ($(filter $(BACKEND),torch jax tensorflow),)
$(error BACKEND must be torch, jax or tensorflow. Received: $(BACKEND))
endif

demo: $(VENV)/.demo-$(BACKEND)
	@KERAS_BACKEND=$(BACKEND) $(RUN) $(VENV)/bin/python examples/demo_digits.py $(ARGS)

# Of the tests on JAX and TensorFlow nearly all the time is XLA compiling models that take a few
# steps: it optimises less than it does by default, and JAX compiles equal models once. The older
# emitters compile sooner too, but those of TensorFlow lose NaN in a maximum.
LESS_XLA := --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true

# A failing backend does not keep the others from running; Ctrl-C stops all. The tests are small:
# a core is better used by another process than by a second thread.
test: $(VENV)/.test
	@trap 'exit 130' INT; summary=""; status=0; \
	for backend in $(BACKENDS); do \
		printf '\n======== tests on %s ========\n' $$backend; \
		start=$$SECONDS; result=passed; \
		xla='$(LESS_XLA)'; [ $$backend != jax ] || xla+=' --xla_cpu_use_fusion_emitters=false'; \
		KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 XLA_FLAGS="$$xla" \
			JAX_COMPILATION_CACHE_DIR=$(CURDIR)/$(VENV)/xla $(RUN) $(VENV)/bin/python \
			-m pytest -q --durations=25 -n $(WORKERS) $(PYTEST_ARGS) || { result=FAILED; status=1; }; \
		summary+="$$(printf '%-12s%s in %d s' $$backend $$result $$((SECONDS - start)))"$$'\n'; \
	done; \
	printf '\n======== summary ========\n%s' "$$summary"; exit $$status

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
