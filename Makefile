# Two commands do all the set-up on a machine that has only Python and make:
#   make search   the main job: install, then search a bit map for the bundled model
#   make test     install, then ruff, mypy --strict and pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES := 1

.PHONY: search test clean

search: $(VENV)/.installed
	$(BIN)/python -m dmpq.search --hw a100

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
