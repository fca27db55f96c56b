# Set-up and jobs. On a fresh Linux machine with Python 3.11 or newer, `make demo` and `make test` do all the set-up.
#
#   make demo ARGS="--seeds 1"       flags for the job
#   make demo TORCH_INDEX=URL       take torch, and torch alone, from another package index, such as PyTorch's own
#                                   index of CPU builds: much smaller, for a machine without a GPU
#   make demo PYTHON=/path/python   use this Python
#   make gpu STAGES="correct kernels" GPU_OUT=folder
#                                   what needs a GPU, with a Python that has a CUDA build of PyTorch; installs nothing

ARGS ?=
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
TORCH_INDEX ?=
STAGES ?=
GPU_OUT ?= results_gpu

VENV := .venv
IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip --disable-pip-version-check
# Compile now what is imported later: where Python may not write bytecode, as in most containers, every start would
# compile it again (torch alone takes seconds). pip compiles one file after the other; this takes all processors. The
# editable install is compiled by nobody else. Some packages ship files that no Python can compile: hence the `|| true`.
COMPILE := $(IN_VENV) -m compileall -qq -j 0 $(VENV)/lib kernels model eval rl train benchmarks || true

# A demo of one step, which runs every loop once.
ONE_STEP := --documents 2000 --pretrain-steps 1 --rl-steps 1 --control-steps 0 --eval-problems 8 --eval-samples 1

# A virtual environment names its own place, and the editable install names this folder. In a moved or copied
# checkout they would run the code of the old place; so note where they were made, and make them again elsewhere.
MADE_IN := $(shell cat $(VENV)/made-in 2>/dev/null)
MOVED := $(if $(MADE_IN),$(if $(filter-out x$(CURDIR),x$(MADE_IN)),moved))

.ONESHELL:
.SHELLFLAGS := -ec
.PHONY: help demo test test-all lint gpu clean moved

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	echo
	echo "targets: demo, test (the fast tests), test-all, lint, gpu, clean (caches and the virtual environment)"

demo: $(VENV)/loops
	$(VENV)/bin/r1zero demo $(ARGS)

test: $(VENV)/installed-dev
	$(IN_VENV) -m pytest -n auto --dist worksteal $(ARGS)

test-all: $(VENV)/installed-dev
	$(IN_VENV) -m pytest -n auto --dist worksteal -m "" $(ARGS)

lint: $(VENV)/installed-dev
	$(IN_VENV) -m ruff check $(ARGS) .
	$(IN_VENV) -m ruff format --check kernels model eval rl train

gpu:
	@for candidate in $(PYTHON) $(IN_VENV) python3; do
	    if why=$$("$$candidate" -c 'import torch; torch.cuda.init()' 2>&1); then
	        exec "$$candidate" -m benchmarks.gpu --out "$(GPU_OUT)" $(if $(STAGES),--stages $(STAGES))
	    fi
	    echo "$$candidate: $$(echo "$$why" | tail -n 1)" >&2
	done
	echo "none of $(PYTHON) $(IN_VENV) python3 has a PyTorch that sees a CUDA device; name one: make gpu PYTHON=..." >&2
	exit 2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: requirements.txt setup.py pyproject.toml $(MOVED)
	@found=
	python=
	enough='import sys; sys.exit(sys.version_info < (3, 11))'
	if [ -n "$(MOVED)" ] || ! $(IN_VENV) -c "$$enough" 2>/dev/null; then
	    for candidate in $(PYTHONS); do
	        "$$candidate" -c "$$enough" 2>/dev/null || continue
	        found=$$candidate
	        if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi
	    done
	    if [ -z "$$found" ]; then
	        echo "r1zero needs Python 3.11 or newer, and none of these is: $(PYTHONS). Install one" >&2
	        echo "(Debian, Ubuntu: sudo apt install python3 python3-venv) or name one: make PYTHON=/path/python" >&2
	        exit 1
	    elif [ -z "$$python" ]; then
	        echo "$$found cannot make a virtual environment: its modules venv and ensurepip are missing." >&2
	        echo "Debian, Ubuntu: sudo apt install python3-venv. Or name another: make PYTHON=/path/python" >&2
	        exit 1
	    fi
	    echo "making $(VENV) with $$("$$python" --version)"
	    "$$python" -m venv --clear $(VENV)
	fi
	if [ -n "$(TORCH_INDEX)" ]; then
	    $(PIP) install --no-compile --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.txt)"
	fi
	$(PIP) install --no-compile -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	$(COMPILE)
	echo "$(CURDIR)" > $(VENV)/made-in
	touch $@

# The loops that Numba compiles, in a process of its own: one that compiles them may round differently from one that
# loads them, and then two demos would not be the same.
$(VENV)/loops: $(VENV)/installed $(wildcard kernels/cpu/*.py)
	@echo "compiling the loops for this processor, once; this takes a minute or two"
	started=$$(date +%s)
	folder=$$(mktemp -d)
	$(VENV)/bin/r1zero demo --run "$$folder/demo" $(ONE_STEP) > "$$folder/log" 2>&1 || tail -n 3 "$$folder/log" >&2
	rm -rf "$$folder"
	echo "compiled in $$(( $$(date +%s) - started )) seconds; the set-up is done"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	@$(PIP) install --no-compile -r requirements-dev.txt
	$(COMPILE)
	touch $@
