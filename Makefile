# make quickstart | test | lint | clean        (another Python: make PYTHON=/path/to/python3.12 ...)
.PHONY: quickstart test lint setup clean
.DELETE_ON_ERROR:

VENV := .venv
READY := $(VENV)/.ready
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

# torch's CUDA build brings its own. Where there is none, the tests interpret our kernels with it, and compile them.
TRITON := triton==3.6.0

# One thread a process: several actors share the cores.
export OMP_NUM_THREADS ?= 1

quickstart: $(READY)
	$(VENV)/bin/amalgam run quickstart

test: lint
	$(VENV)/bin/pytest -n 2 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/basedpyright

setup: $(READY)

# `typing/amalgam` is for the type checker: see pyproject.toml.
$(READY): pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo "error: Amalgam needs Python 3.11 or 3.12, and none of python3, python3.12, python3.11 is one;" \
		"install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1)
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -c "import pycosat" 2>/dev/null || echo '#include <Python.h>' | \
		$$($(VENV)/bin/python -c 'import sysconfig as s; print(s.get_config_var("CC"), "-I" + s.get_path("include"))') \
		-fsyntax-only -x c - 2>/dev/null || { echo "error: reasoning-gym needs pycosat, which is built from source:" \
		"install a C compiler and Python's headers (Debian: apt-get install gcc python3-dev)" >&2; exit 1; }
	@echo "Installing into $(VENV): some 2 GB, a few minutes ..."
	@$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/pip install -qq --disable-pip-version-check $(TRITON)
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/amalgam
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
