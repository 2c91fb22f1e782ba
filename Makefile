# Every target does its own set-up: missing Debian packages, the environment .venv, the extension module.
#
#   make demo    the main job on this machine with real parts, under a minute
#   make test    lint, C unit tests under sanitizers, Python tests: what continuous integration runs
#   make setup   the set-up alone           make lint    the linters alone
#   make bench   benchmarks                 make fuzz    libFuzzer, FUZZ_SECONDS for each target (30)
#   make tsan    C tests that use threads, under ThreadSanitizer
#   make valgrind  C programs with libesp_rmaker_ota, whole updates, under valgrind
#   make sdist   source archive and wheel   make check   builds them and installs the wheel in an empty environment
#   make format  lets the formatters rewrite the sources
#   make clean   removes what was built     make distclean  removes .venv too
#
# PYTHON=python3.12 chooses the interpreter of .venv; PYTEST_ARGS="-k name" goes to pytest.

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench fuzz tsan valgrind sdist check clean distclean

export RMAKER_OTA_VENV ?= .venv
BIN := $(RMAKER_OTA_VENV)/bin
PY := $(BIN)/python
FUZZ_SECONDS ?= 30

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@scripts/setup.sh test

demo:
	@scripts/setup.sh demo
	@$(BIN)/rmaker-ota demo $(DEMO_ARGS)

lint: setup
	@$(PY) scripts/lint.py

test: setup
	@$(PY) scripts/lint.py
	@$(PY) -m pytest $(PYTEST_ARGS)

format: setup
	@$(PY) scripts/lint.py --fix

bench: setup
	@$(PY) -m pytest benches -o python_files='bench_*.py' --benchmark-columns=min,median,rounds $(PYTEST_ARGS)
	@$(PY) benches/compare.py

fuzz:
	@scripts/setup.sh fuzz
	@$(PY) -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

tsan: setup
	@$(PY) -m tests.csrc.csrc_build --sanitizer thread --threaded

valgrind: setup
	@RMAKER_OTA_VALGRIND=1 $(PY) -m pytest tests/flows/test_valgrind.py $(PYTEST_ARGS)

sdist: setup
	@$(PY) -m pip install --quiet build
	@$(PY) -m build

check: setup
	@$(PY) scripts/check_dist.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks python/*.egg-info
	rm -f python/rmaker_ota/ota_core*.so
	rm -rf python/rmaker_ota/embed/include python/rmaker_ota/embed/lib
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
