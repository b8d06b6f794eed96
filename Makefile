# `make test` is all a fresh machine needs: Python, make and a C++ compiler (without one, the slower backends are tested).

PYTHON ?= python3
VENV ?= .venv
# One exact torch: "torch>=2.10", the requirement of the package, would fetch the newest release, with gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Further words for pytest, as in `make test PYTEST="-k qformer"`.
PYTEST ?=
GUARDS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# Where `make demo` keeps its catalogue and its run.
DEMO ?= runs/demo
CODE := $(wildcard em3 kernels benchmarks tests setup.py .ci)
SOURCES := pyproject.toml setup.py em3/_version.py kernels/__init__.py benchmarks/__init__.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test kernels sanitize guards readme install lint format wheel clean

# A catalogue with known truth, three ways to rank it, a report. Begun anew each time; a killed one goes on with
# `em3 train --resume runs/demo/run`.
demo: install
	rm -rf $(DEMO)
	$(BIN)/em3 data make $(DEMO)/catalogue
	$(BIN)/em3 train --data $(DEMO)/catalogue --out $(DEMO)/run --config benchmarks/configs/demo.yaml

# A thread a worker: with two each on two cores, tests took 1.6 times as long. Those about threads set their number themselves.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

# An editable install: Python edits need no new one, C++ edits compile what they touch.
install: $(VENV)/installed

# The build tools live in the environment, so that objects outlive a build (isolation moves pybind11 each time).
$(VENV)/tools: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" ninja build
	touch $@

# The stamp bears the time of the start, lest a file that is edited during the build be missed next time.
$(VENV)/installed: $(VENV)/tools $(SOURCES)
	touch $@.started
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,hf,test,bench]"
	mv $@.started $@

# What each Triton kernel takes of a GPU's registers and memory, compiled for three of them; none is needed. Minutes.
kernels: install
	$(BIN)/python -m tests.kernels.compiled

# The compiled kernels' tests under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer. Minutes.
sanitize: install
	$(BIN)/python -m tests.sanitized

# Whether speed or memory was lost, against the floors in benchmarks/guards.
guards: install
	$(BIN)/python -m pytest benchmarks $(GUARDS)

# The numbers in README.md, from benchmarks/results/cpu; `em3 bench --out benchmarks/results/cpu` measures those anew.
readme: install
	$(BIN)/python -m em3.benchmarks.readme

lint: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# A source distribution, and a wheel made from it, in dist/.
wheel: $(VENV)/tools
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info $(VENV) em3/_C*.so em3/_build_record.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
