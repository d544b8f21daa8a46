# make demo | test | test-newest | lint | parity | bench : each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
TUNIX_VENV ?= .venv-tunix
# Tunix needs Python >= 3.12.
TUNIX_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) python3.13)
# Only the parity environment holds torch; jalign itself never needs it.
TORCH ?= torch==2.13.0
TUNIX ?= 0.1.7

# tests/conftest.py leaves LLVM's optimization out; where numbers are compared with those
# of others it is what users have.
OPTIMIZED = --xla_backend_optimization_level=3
# What a version of jax can change: compilation, sharding, Pallas, custom derivatives,
# checkpoints; not files, formulas and errors, which NumPy and Python decide.
NEWEST = $(addprefix tests/models/test_,attention.py attention_blocked.py \
		attention_kernels.py cache.py decoder.py gradients.py heads.py hf_read.py \
		layers.py lora.py model.py platform.py quantized.py) \
	tests/sharding tests/generate/test_engine.py \
	$(addprefix tests/losses/test_properties.py::test_,eight_devices_give_what_one_gives \
		forward_mode_agrees_with_reverse_mode numpy_jax_and_jit_agree_in_float32) \
	tests/losses/test_chunked.py tests/losses/test_logps.py \
	tests/train/test_step.py tests/train/test_loop.py tests/train/test_checkpoint.py \
	tests/train/test_optim.py tests/train/test_offline.py \
	tests/train/test_online.py::test_a_run_leaves_models_metrics_and_a_report

.PHONY: demo test test-newest lint parity bench clean

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

# make test-newest PYTHON=python3.13 VENV=.venv-newest
test-newest: $(VENV)/.installed
	XLA_FLAGS=$(OPTIMIZED) $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(NEWEST)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/python scripts/make_api_docs.py --check

# Live comparison with torch, transformers and trl.
parity: $(PARITY_VENV)/.installed
	XLA_FLAGS=$(OPTIMIZED) $(PARITY_VENV)/bin/python -m pytest tests/parity

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
