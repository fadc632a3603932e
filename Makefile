# Everything a developer types. Each target makes the virtual environment that it needs, on a bare machine with Python 3.11+.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test slow lint format types layers notebooks wheel check bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo  ## upscale a photograph, result in demo/
	$(BIN)/latent-tiles demo

test: $(VENV)/.test  ## the tests that run everywhere, in a few minutes
	$(BIN)/python -m pytest

slow: $(VENV)/.test  ## tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: $(VENV)/.dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## mend what style can mend on its own
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pyright and import-linter cannot follow an editable install that maps pipelines/ into the package, so they read an
# installed copy.
.PHONY: copy
copy: $(VENV)/.dev
	rm -rf build/copy build/lib build/bdist.*
	$(INSTALL) --no-deps --target build/copy .

types: copy  ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: copy  ## imports run downwards only
	cd build/copy && ../../$(BIN)/lint-imports --config ../../pyproject.toml

notebooks: $(VENV)/.dev  ## execute the notebooks at tiny size
	LATENT_TILES_TINY=1 $(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/notebooks notebooks/*.ipynb

wheel: $(VENV)/.dev  ## build the wheel and import it without the checkout
	rm -rf build/lib build/bdist.* build/wheel dist
	$(BIN)/python -m build --wheel
	$(INSTALL) --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel ../$(BIN)/python -c "import latent_tiles.pipelines.upscale as m; assert 'build/wheel' in m.__file__, m.__file__"

check: lint types layers test notebooks wheel  ## all of the above that must pass

bench: $(VENV)/.test  ## what the tiling machinery and the exact autoencoder cost
	$(BIN)/python benchmarks/bench_denoise.py
	$(BIN)/python benchmarks/bench_vae.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
