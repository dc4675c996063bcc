# The README's two commands, and what goes with them. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

# Tests run in two worker processes of one thread each: `make test WORKERS=8`, or `OMP_NUM_THREADS=2 make test`, is as
# right. A worker needs about 2 GB. tests/README.md says what runs where.
WORKERS ?= 2
test test-fast test-isa test-deep: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ISA ?= avx2

.PHONY: demo test test-fast test-isa test-deep mutants bench lint typecheck format clean

demo: $(VENV)/.run
	$(BIN)/qlorag demo

# Whether a Triton kernel is compiled or interpreted is decided when it is imported: two runs of pytest, and both run
# even if the first fails.
test: $(VENV)/.test
	@status=0; \
	$(PYTEST) -m "not deep" || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter || status=1; \
	exit $$status

# While at work: nothing that needs a real model, another target's compiler or another program's start.
test-fast: $(VENV)/.test
	$(PYTEST) -m "not deep and not model and not slow"

# What depends on the instruction set, once more at another one, with torch's own products held to AVX2 too.
test-isa: $(VENV)/.test
	QLORAG_CPU_LEVEL=$(ISA) ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m isa

# Other targets' machine code, sanitizers, emulators, whole benchmarks.
test-deep: $(VENV)/.test
	$(PYTEST) -m deep

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
	rm -rf build && mkdir -p build/typecheck  # an old build/lib would put files that moved into the wheel
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
