# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11 (CPU is enough).
PYTHON ?= python3.11
# Groups of tests that run at the same time.
JOBS ?= 2
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip
STAMP := $(VENV)/.installed
# NeMo needs older versions of what the rest needs: an environment of its own, built once for each content of its pins.
NEMO_VENV ?= .venv-nemo
NEMO_PIP := $(NEMO_VENV)/bin/python -m pip
NEMO_STAMP := $(NEMO_VENV)/.installed-$(firstword $(shell sha256sum constraints-nemo.txt))
# Several processes with two threads each on two cores are many times slower than with one each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

# In the order of benchmarks/report.py.
BENCHMARKS := $(filter $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)), \
	throughput dynamics resume scale environment)

.PHONY: demo test test-all test-nemo lint bench bench-quick fuzz clean

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip -c constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=2 $(VENV)/bin/dmagent demo --output demo_output

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

$(NEMO_STAMP):
	rm -rf $(NEMO_VENV)
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_PIP) install --quiet --upgrade pip -c constraints-nemo.txt
	$(NEMO_PIP) install --quiet -c constraints-nemo.txt -e '.[nemo]' pytest pytest-timeout
	touch $@

# One process at a time: each takes a minute to import NeMo where two share a core.
test-nemo: $(NEMO_STAMP)
	CONFORMANCE_TIMEOUT=900 $(NEMO_VENV)/bin/python -m pytest -m 'not slow' --timeout 1800 tests/integration/nemo \
		tests/examples/test_nemo_pretrain.py $(PYTEST_ARGS)
	CONFORMANCE_TIMEOUT=900 $(NEMO_VENV)/bin/python -m pytest -m 'not slow' --timeout 1800 tests/conformance -k NeMo $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	for name in $(BENCHMARKS); do $(VENV)/bin/python benchmarks/$$name.py || exit 1; done
	$(VENV)/bin/python benchmarks/report.py

# One short repeat of everything, into build/: it shows that the programs run, not how fast anything is.
bench-quick: $(STAMP)
	for name in $(BENCHMARKS); do \
		$(VENV)/bin/python benchmarks/$$name.py --quick --output build/bench-quick/$$name.json || exit 1; done
	$(VENV)/bin/python benchmarks/report.py --results build/bench-quick --docs build/bench-quick

# Coverage-guided; needs atheris (tests/fuzz/README.md). Fails at the first input that breaks a property.
FUZZ ?= tar members npy checkpoint state manifest cache
RUNS ?= 100000
fuzz: $(STAMP)
	for name in $(FUZZ); do \
		PYTHONPATH=. $(VENV)/bin/python tests/fuzz/run.py $$name -runs=$(RUNS) -timeout=20 -rss_limit_mb=3000 \
			-max_len=9000 -artifact_prefix=build/fuzz/ build/fuzz/$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) $(NEMO_VENV) build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache
