# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= 2
BENCH ?= runs/bench/$(shell date +%F)

.PHONY: venv demo test test-all check format mutants docs bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,plot,images,triton]"
	touch $@

demo: venv
	$(BIN)/regard compare --task "recall(vocab=256)" --seeds 0,1 --lrs 3e-3,1e-2 --steps 200 \
	  --threads $(THREADS) --out runs/demo

test: venv
	$(BIN)/python -m pytest -n $(THREADS) -m "not slow"

test-all: venv
	$(BIN)/python -m pytest -n $(THREADS)
	$(MAKE) mutants

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: venv
	$(BIN)/python -m pytest -q -n $(THREADS) tests/mutants.py

docs: venv
	$(BIN)/python -c "from pathlib import Path; \
	from regard.report.methods import write_pages; write_pages(Path('.'))"

bench: venv
	$(BIN)/regard bench targets --threads $(THREADS) --out $(BENCH)
	$(BIN)/regard bench speed --lengths 256..4096 --budget 0.3 --cap 0.5 --threads $(THREADS) \
	  --out $(BENCH) --publish benchmarks/results

clean:
	rm -rf $(VENV) runs build dist
