# make demo | test | lint | check. Another interpreter for a new environment: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# else mkdocs-material's news stand in every build
export NO_MKDOCS_2_WARNING := 1
READY := $(VENV)/.installed

.PHONY: help demo test lint docs check format clean

help:
	@echo "make demo    set up $(VENV) and align the embedded 'shapes' model with DRaFT; the run goes into runs/"
	@echo "make test    the same environment, then the whole test suite"
	@echo "make lint    ruff (lint and format), pyright, import-linter, and the site with strict links"
	@echo "make docs    the site, into build/site"
	@echo "make check   lint, then test: everything"
	@echo "make format  let ruff mend what it can"

demo: $(READY)
	$(BIN)/diffalign train --method draft

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# All five run, also when one fails; the status says whether one did. mkdocs: with --quiet its strictness sees no warning.
lint: $(READY)
	@status=0; \
	for tool in "ruff check" "ruff format --check" "pyright" "lint-imports --no-logo" "mkdocs build"; do \
		echo "$$tool"; $(BIN)/$$tool || status=1; \
	done; exit $$status

# Its search works where a server is: python -m http.server -d build/site
docs: $(READY)
	$(BIN)/mkdocs build

check:
	@status=0; $(MAKE) lint || status=1; $(MAKE) test || status=1; exit $$status

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamp: made again when the dependencies change. An environment that exists is used.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { \
		$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "diffalign needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")' \
		&& $(PYTHON) -m venv $(VENV); }
	@echo "Installing diffalign and what it needs into $(VENV) (minutes the first time: torch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
