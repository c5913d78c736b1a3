# make demo: set up, then compress a real Whisper and let it speak. make test: every check.
# make bench: every kernel against its rivals and the machine's limits.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: demo test lint bench setup clean

demo: $(READY)
	$(BIN)/dqw demo

test: lint
	$(BIN)/python -m pytest -q --durations=15

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy dqw
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

# The peers that dqw is measured against, then everything, warm and cold, into bench/results/.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[bench]' --no-build-isolation
	@mkdir -p bench/results
	$(BIN)/python -m bench --json bench/results/warm.json --csv bench/results/warm.csv --plot bench/results/roofline.png
	$(BIN)/python -m bench --op quant_linear --cold --json bench/results/cold.json --csv bench/results/cold.csv

setup: $(READY)

$(READY): setup.py pyproject.toml $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dqw needs Python 3.11 or newer: set PYTHON=python3.x"; exit 1; }
	@echo "Setting up .venv: about 0.5 GB of packages with the CPU build of torch; then the C++ kernels."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "venv is missing: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --progress-bar on "$(TORCH)" setuptools wheel
	$(BIN)/python -m pip install --quiet --progress-bar on --no-build-isolation -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv build dqw.egg-info dqw/*.so
