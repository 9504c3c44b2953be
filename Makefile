# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VISION := $(VENV)/vision
OLDEST := .venv-oldest
THREADS ?= 2
BENCH ?= runs/bench/$(shell date +%F)

.PHONY: venv demo test test-all test-oldest check format mutants docs support bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,plot,images,triton]"
	# timm needs torchvision, whose compiled operators there may be no build of: kept apart
	$(BIN)/python -m pip install --quiet --no-deps --target $(VISION) --upgrade \
	  -c constraints.txt timm torchvision
	touch $@

demo: venv
	$(BIN)/regard compare --task "recall(vocab=256)" --seeds 0,1 --lrs 3e-3,1e-2 --steps 200 \
	  --threads $(THREADS) --out runs/demo
	$(BIN)/regard atlas pocket --out runs/demo/atlas
	$(BIN)/regard fit pocket --budget 0.25 --task needle --examples 32 --exams 64 --out runs/demo/fit
	@echo "compared: runs/demo/report.html"
	@echo "atlas:    runs/demo/atlas/atlas.html"
	@echo "plan:     runs/demo/fit/plan.json, runs/demo/fit/report.html"

test: venv
	REGARD_VISION=$(VISION) $(BIN)/python -m pytest -n $(THREADS) -m "not slow"

test-all: venv test-oldest
	REGARD_VISION=$(VISION) $(BIN)/python -m pytest -n $(THREADS)
	$(MAKE) mutants

# Plans on the oldest transformers they support; `make test` has the newest.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(THREADS) tests/test_support.py tests/test_plans.py \
	  tests/test_treatments.py

$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]" transformers==5.2.0
	touch $@

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: venv
	$(BIN)/python -m pytest -q -n $(THREADS) tests/mutants.py tests/treatment_mutants.py

docs: venv
	$(BIN)/python -c "from pathlib import Path; \
	from regard.report.methods import write_pages; write_pages(Path('.'))"

support: venv
	REGARD_SUPPORT=docs/support.md REGARD_VISION=$(VISION) $(BIN)/python -m pytest -q \
	  tests/test_support.py

bench: venv
	$(BIN)/regard bench targets --threads $(THREADS) --out $(BENCH)
	$(BIN)/regard bench memory --cap 3 --threads $(THREADS) --out $(BENCH)
	$(BIN)/regard bench speed --budget 0.25 --cap 1 --threads $(THREADS) --out $(BENCH)
	$(BIN)/regard bench decode --budget 0.3 --fill 3 --threads $(THREADS) --out $(BENCH) \
	  --publish benchmarks/results

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist
