# make demo | test | lint | parity | bench : each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
TUNIX_VENV ?= .venv-tunix
# Tunix needs Python >= 3.12.
TUNIX_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) python3.13)
# Only the parity environment holds torch; jalign itself never needs it.
TORCH ?= torch==2.13.0
TUNIX ?= 0.1.7

.PHONY: demo test lint parity bench clean

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

$(TUNIX_VENV)/.installed:
	$(TUNIX_PYTHON) -m venv $(TUNIX_VENV)
	$(TUNIX_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TUNIX_VENV)/bin/python -m pip install --quiet "google-tunix==$(TUNIX)"
	touch $@

# Against TRL and Tunix: make bench BENCH="--only sft,dpo --model 7m --repeats 3".
# Goes on without Tunix where it cannot be installed; the table says so.
bench: $(VENV)/.installed $(PARITY_VENV)/.installed
	-$(MAKE) $(TUNIX_VENV)/.installed
	$(VENV)/bin/python -m benchmarks --trl $(PARITY_VENV)/bin/python \
		--tunix $(TUNIX_VENV)/bin/python $(BENCH)

clean:
	rm -rf $(VENV) $(PARITY_VENV) .venv-* runs build dist
