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
# Megatron-core 0.17 and later need Python 3.12. An interpreter is the first of these that runs: python3.12 on PATH, then
# pyenv's (whose shim on PATH runs only where that version is selected). To name another: make PYTHON312=... test-megatron.
# Where there is none, the targets that need it say so and do nothing.
find-python = $(shell for python in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python; do \
	"$$python" -c 'import ensurepip, ssl' 2>/dev/null && echo "$$python" && break; done)
ifndef PYTHON312
PYTHON312 := $(call find-python,3.12)
endif
ifndef PYTHON313
PYTHON313 := $(call find-python,3.13)
endif
MEGATRON_VENV ?= .venv-megatron
MEGATRON_PIP := $(MEGATRON_VENV)/bin/python -m pip
MEGATRON_STAMP := $(MEGATRON_VENV)/.installed-$(firstword $(shell sha256sum constraints-megatron.txt))
VENV313 ?= .venv-python313
PIP313 := $(VENV313)/bin/python -m pip
STAMP313 := $(VENV313)/.installed-$(firstword $(shell sha256sum constraints-python313.txt))
BENCH_VENV ?= .venv-bench
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip
BENCH_STAMP := $(BENCH_VENV)/.installed-$(firstword $(shell sha256sum constraints-bench.txt))
STREAMING_VENV ?= .venv-streaming
STREAMING_PIP := $(STREAMING_VENV)/bin/python -m pip
STREAMING_STAMP := $(STREAMING_VENV)/.installed-$(firstword $(shell sha256sum constraints-streaming.txt))
# Several processes with two threads each on two cores are many times slower than with one each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

# In the order of benchmarks/report.py.
BENCHMARKS := $(filter $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)), \
	throughput dynamics resume scale environment)

.PHONY: demo test test-unit test-all test-nemo test-megatron test-python313 test-transformers lint docs bench bench-quick fuzz clean

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard dmagent_loader/*.h dmagent_loader/*/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip -c constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=2 $(VENV)/bin/dmagent demo --output demo_output

# Files whole, in their own order: those whose tests take longest come first.
DEALT := -n $(JOBS) --dist loadgroup --no-loadscope-reorder
test: $(STAMP)
	$(VENV)/bin/python -m pytest $(DEALT) -m 'not slow and not megatron' $(PYTEST_ARGS)

# One process; none is started and nothing is waited for (tests/unit/conftest.py).
test-unit: $(STAMP)
	$(VENV)/bin/python -m pytest tests/unit -m 'not slow' $(PYTEST_ARGS)

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest $(DEALT) $(PYTEST_ARGS)

$(NEMO_STAMP):
	rm -rf $(NEMO_VENV)
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_PIP) install --quiet --upgrade pip -c constraints-nemo.txt
	$(NEMO_PIP) install --quiet -c constraints-nemo.txt -e '.[nemo]' pytest pytest-timeout
	touch $@

# One process at a time: each takes a minute to import NeMo where two share a core.
test-nemo: $(NEMO_STAMP)
	CONFORMANCE_TIMEOUT=900 $(NEMO_VENV)/bin/python -m pytest -m 'not slow' --timeout 1800 tests/trainers/nemo \
		tests/trainers/examples/test_nemo_pretrain.py $(PYTEST_ARGS)
	CONFORMANCE_TIMEOUT=900 $(NEMO_VENV)/bin/python -m pytest -m 'not slow' --timeout 1800 tests/trainers/conformance -k NeMo $(PYTEST_ARGS)

# The training script of the Hugging Face Trainer, too: it shows that the package installs and trains on this Python.
HF_RUN := tests/trainers/examples/test_huggingface_trainer.py

ifeq ($(PYTHON312),)
test-megatron:
	@echo "test-megatron: skipped, because there is no Python 3.12, which megatron-core 0.17 and later need; name one" \
		"with PYTHON312=..."
else
$(MEGATRON_STAMP):
	rm -rf $(MEGATRON_VENV)
	$(PYTHON312) -m venv $(MEGATRON_VENV)
	$(MEGATRON_PIP) install --quiet --upgrade pip -c constraints-megatron.txt
	$(MEGATRON_PIP) install --quiet -c constraints-megatron.txt -e '.[hf,megatron]' 'megatron-core[training]' \
		pytest pytest-timeout pytest-xdist psutil tokenizers
	touch $@

test-megatron: $(MEGATRON_STAMP)
	$(MEGATRON_VENV)/bin/python -m pytest $(DEALT) -m 'not slow' --timeout 900 tests/trainers/megatron_lm \
		tests/trainers/test_megatron.py tests/trainers/examples/test_megatron_pretrain.py $(HF_RUN) $(PYTEST_ARGS)
	$(MEGATRON_VENV)/bin/python -m pytest $(DEALT) -m 'not slow' tests/trainers/conformance -k Megatron $(PYTEST_ARGS)
endif

ifeq ($(PYTHON313),)
test-python313:
	@echo "test-python313: skipped, because there is no Python 3.13; name one with PYTHON313=..."
else
$(STAMP313):
	rm -rf $(VENV313)
	$(PYTHON313) -m venv $(VENV313)
	$(PIP313) install --quiet --upgrade pip -c constraints-python313.txt
	$(PIP313) install --quiet -c constraints-python313.txt -e '.[hf]' pytest pytest-timeout psutil tokenizers
	touch $@

test-python313: $(STAMP313)
	$(VENV313)/bin/python -m pytest $(HF_RUN) $(PYTEST_ARGS)
endif

# The tests of what a version of transformers may change, with one that the rest does not use, and with TRL: packages of
# the main environment, and others in front of them.
#   make test-transformers TRANSFORMERS=4.51.0 MORE="huggingface_hub<1 tokenizers<0.22 datasets==3.6.0 accelerate==1.10.0"
#   make test-transformers TRANSFORMERS=5.23.0 MORE=trl==1.16.0
TRANSFORMERS ?= 5.24.0
TRANSFORMERS_VENV = .venv-transformers-$(TRANSFORMERS)
test-transformers: $(STAMP)
	rm -rf $(TRANSFORMERS_VENV)
	$(PYTHON) -m venv $(TRANSFORMERS_VENV)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(TRANSFORMERS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth
	$(TRANSFORMERS_VENV)/bin/python -m pip install --quiet --no-deps --upgrade transformers==$(TRANSFORMERS) $(foreach one,$(MORE),'$(one)')
	PYTHONPATH=$(CURDIR) $(TRANSFORMERS_VENV)/bin/python -m pytest tests/trainers/huggingface/test_first_week.py \
		tests/trainers/huggingface/test_trl.py $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, into build/site. Every warning is an error: links, anchors, and names in the reference that do not exist.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# The loaders that ours is measured against, where they do not fit into the environment of the tests. litdata and
# mosaicml-streaming go without what they declare, torchvision (whose build wants CUDA) and the clients of all clouds.
$(BENCH_STAMP):
	rm -rf $(BENCH_VENV)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) install --quiet -c constraints-bench.txt torch megatron-energon webdataset lightning-utilities boto3 requests
	$(BENCH_PIP) install --quiet -c constraints-bench.txt --no-deps litdata
	touch $@

$(STREAMING_STAMP):
	rm -rf $(STREAMING_VENV)
	$(PYTHON) -m venv $(STREAMING_VENV)
	$(STREAMING_PIP) install --quiet -c constraints-streaming.txt torch numpy transformers tqdm catalogue requests \
		xxhash zstd Brotli python-snappy pillow
	$(STREAMING_PIP) install --quiet -c constraints-streaming.txt --no-deps mosaicml-streaming
	cp -r benchmarks/stand_ins/* $$($(STREAMING_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	touch $@

# The text of DMAGENT_DATA (benchmarks/data.py says what must be there), or else of the Python installation.
BENCH_ENVIRONMENTS := $(STAMP) $(BENCH_STAMP) $(STREAMING_STAMP)
OPTIONS_throughput = --bench-python $(BENCH_VENV)/bin/python --streaming-python $(STREAMING_VENV)/bin/python
OPTIONS_resume = --streaming-python $(STREAMING_VENV)/bin/python
bench: $(BENCH_ENVIRONMENTS)
	$(foreach name,$(BENCHMARKS),$(VENV)/bin/python benchmarks/$(name).py $(OPTIONS_$(name)) &&) true
	$(VENV)/bin/python benchmarks/report.py

# One short repeat of everything, into build/: it shows that the programs run, not how fast anything is.
QUICK := build/bench-quick
bench-quick: $(BENCH_ENVIRONMENTS)
	$(foreach name,$(BENCHMARKS),$(VENV)/bin/python benchmarks/$(name).py $(OPTIONS_$(name)) --quick \
		--output $(QUICK)/$(name).json &&) true
	$(VENV)/bin/python benchmarks/report.py --results $(QUICK) --docs $(QUICK)

# Coverage-guided; needs atheris (tests/fuzz/README.md). Fails at the first input that breaks a property.
FUZZ ?= tar members npy checkpoint state manifest cache overview
RUNS ?= 100000
fuzz: $(STAMP)
	for name in $(FUZZ); do \
		PYTHONPATH=. $(VENV)/bin/python tests/fuzz/run.py $$name -runs=$(RUNS) -timeout=20 -rss_limit_mb=3000 \
			-max_len=9000 -artifact_prefix=build/fuzz/ build/fuzz/$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) $(NEMO_VENV) $(MEGATRON_VENV) $(VENV313) .venv-transformers-* $(BENCH_VENV) $(STREAMING_VENV) build dist *.egg-info dmagent_loader/*/*.so demo_output .pytest_cache .mypy_cache .ruff_cache
