# make demo: set up, then compress a real Whisper and let it speak. make test: every check.
# make bench: every kernel against its rivals and the machine's limits.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
SOURCES := $(shell find csrc tests/cuda_host -name '*.cpp' -o -name '*.cu' -o -name '*.h' 2>/dev/null)

.PHONY: demo test lint bench gpu gpu-test gpu-bench setup clean

demo: $(READY)
	$(BIN)/dqw demo

test: lint
	$(BIN)/python -m pytest -q -rs --durations=15 -n 2 --dist loadfile

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

# On a machine with an NVIDIA GPU, nvcc and a CUDA build of torch (TORCH=... names it): every check
# and every table that needs one (`make -k gpu`: the tables, too, where a check fails). A peer that
# cannot be installed is left out and named; a table that is cut off keeps the shapes that are done.
gpu: gpu-test gpu-bench

gpu-test: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[bench,gpu]' --no-build-isolation
	-$(BIN)/python -m pip install --quiet bitsandbytes gemlite
	DQW_CUDA=1 $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m pytest -q tests/test_cuda.py tests/test_cuda_host.py tests/test_cuda_fake_quant_host.py tests/test_cuda_build.py tests/test_quant_linear_triton.py tests/test_fake_quant_triton.py tests/test_devices.py
	@if command -v compute-sanitizer; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1 \
	    $(BIN)/python -m pytest -q tests/test_cuda.py -k test_case; \
	else echo "compute-sanitizer is not installed: skipped"; fi

gpu-bench: $(READY)
	@mkdir -p bench/results
	$(BIN)/python -m bench --device cuda --dtype float16 --json bench/results/cuda-float16.json --csv bench/results/cuda-float16.csv
	$(BIN)/python -m bench --device cuda --dtype bfloat16 --op quant_linear --json bench/results/cuda-bfloat16.json
	$(BIN)/python -m bench --device cuda --dtype float16 --op quant_linear --cold --json bench/results/cuda-cold.json --csv bench/results/cuda-cold.csv
	$(BIN)/python -m bench --device cuda --dtype float32 --op fake_quant --json bench/results/cuda-fake-quant.json

setup: $(READY)

$(READY): setup.py pyproject.toml $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dqw needs Python 3.11 or newer: set PYTHON=python3.x"; exit 1; }
	@echo "Setting up .venv: about 0.5 GB of packages with the CPU build of torch, more with the CUDA build,"
	@echo "which a package index may have as the only one (PIP_EXTRA_INDEX_URL=… adds an index); then the C++ kernels."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "venv is missing: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --progress-bar on "$(TORCH)" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --progress-bar on --no-build-isolation -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv build dqw.egg-info dqw/*.so
