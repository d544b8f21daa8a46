# make demo | test | lint | parity : each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
# Only the parity environment holds torch; jalign itself never needs it.
TORCH ?= torch==2.13.0

.PHONY: demo test lint parity notebooks clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

$(PARITY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PARITY_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(PARITY_VENV)/bin/python -m pip install --quiet -e ".[dev,parity]"
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/jalign demo --out runs/demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Live comparison with torch, transformers and trl.
parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest tests/parity

clean:
	rm -rf $(VENV) $(PARITY_VENV) .venv-* runs build dist
