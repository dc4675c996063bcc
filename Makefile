# The README's two commands, and what goes with them. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Compilers and OpenMP obey these; tests never time anything, so two threads are plenty.
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test mutants bench lint typecheck format clean

demo: $(VENV)/.run
	$(BIN)/qlorag demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/interpreter

# Faults in the code that a test has to notice; writes tests/MUTANTS.md. About 40 minutes, and no part of CI.
mutants: $(VENV)/.test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutants]'
	nice $(BIN)/python tests/mutants/run.py

bench: $(VENV)/.test
	$(BIN)/python -m bench.run_all --json bench/results.json
	$(BIN)/python bench/readme_tables.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel is what users get, so the wheel is what is checked, in a folder where the checkout cannot be seen.
typecheck: $(VENV)/.test
	rm -rf build/typecheck && mkdir -p build/typecheck
	$(BIN)/python -m build --wheel --no-isolation --outdir build/typecheck . > build/typecheck/log 2>&1 || (cat build/typecheck/log; exit 1)
	$(BIN)/python -m pip install -q --no-deps --target build/typecheck/site build/typecheck/*.whl
	cd build/typecheck/site && ../../../$(BIN)/python -m mypy --config-file ../../../pyproject.toml -p qlorag
	cd build/typecheck/site && ../../../$(BIN)/python -c "import qlorag.recipes.cli as c; assert 'typecheck' in c.__file__, c.__file__; c.build_parser()"

# Installed once; again when a pin or the project's own metadata changes. torch is named first and alone, so that
# a CPU build is taken where the index offers one at this version.
$(VENV)/.run: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
