# Every target sets up what it needs. On a fresh machine: `make demo` or `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow bench bench-ppo benchmark test-plug-ins docs check format lint type clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,gguf,baselines,lora,feedback,metrics,tune]'
	touch $@

demo: $(BIN)/.installed  ## the main job, 7 to 8 minutes on 2 cores: the report is in runs/<time>/report.md
	$(BIN)/python train.py

test: $(BIN)/.installed  ## the quick tests, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(BIN)/.installed  ## the slow ones, and those that fetch assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'slow or network'

test-plug-ins: $(VENV)-plug-ins/.installed  ## Tianshou, TorchRL, RLlib, skrl and TRL, in an environment of their own
	OMP_NUM_THREADS=1 $(VENV)-plug-ins/bin/python -m pytest -m plug_ins tests/test_plug_in_libraries.py

$(VENV)-plug-ins/.installed: pyproject.toml constraints-plug-ins.txt
	$(PYTHON) -m venv $(VENV)-plug-ins
	$(VENV)-plug-ins/bin/python -m pip install --quiet -c constraints-plug-ins.txt -e '.[plug-ins]'
	touch $@

bench: $(BIN)/.installed  ## speed against a bare loop, generate, stock SB3 and TRL: runs/throughput/throughput.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.throughput

bench-ppo: $(VENV)-ppo/.installed  ## the same against the last TRL with a PPO trainer, in an environment of its own
	TRL_EXPERIMENTAL_SILENCE=1 $(VENV)-ppo/bin/python -m benchmarks.throughput --workloads tiny real \
		--peers "bare loop" TokenPPO "TRL PPO" --out runs/throughput-ppo

$(VENV)-ppo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-ppo
	grep -v '^trl==' constraints.txt > $(VENV)-ppo/constraints.txt
	$(VENV)-ppo/bin/python -m pip install --quiet -c $(VENV)-ppo/constraints.txt -e '.[gguf]' datasets trl==1.12.0
	touch $@

benchmark: $(BIN)/.installed  ## algorithms against each other: runs/baselines/baselines.md
	test -s benchmarks/baselines-chosen.yaml || $(BIN)/python -m benchmarks.baselines --tune
	$(BIN)/python -m benchmarks.baselines

docs: $(BIN)/.installed  ## the documentation, its snippets tried: docs/_build/html/index.html
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -qW --keep-going -b html docs docs/_build/html
	$(BIN)/sphinx-build -qW -b doctest docs docs/_build/doctest

check: lint type test  ## what CI runs first

format: $(BIN)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(BIN)/.installed
	$(BIN)/mypy
	$(BIN)/mypy train.py stages benchmarks examples

clean:
	rm -rf $(VENV) $(VENV)-ppo $(VENV)-plug-ins .mypy_cache .pytest_cache .ruff_cache .hypothesis
