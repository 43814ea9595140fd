# make demo    upscale a photograph in a fresh environment without torch
# make test    every test, in an environment of its own; PIP_EXTRA_INDEX_URL with PyTorch's CPU index saves a large download
# make bench   time every contender that runs here: benchmarks/report/report.html; for believable figures, on a quiet machine
# make check   lint, format, types
# make clean   remove environments and everything built

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

VENV = .venv/.stamp
VENV_DEMO = .venv-demo/.stamp
VENV_NUMPY1 = .venv-numpy1/.stamp

NATIVE := pyproject.toml CMakeLists.txt $(wildcard sr3rt/native/*)
PACKAGE := $(NATIVE) LICENSE README.md $(shell find sr3rt export -type f -not -name '*.pyc' -not -name '*.so')
# What runs without the export extra, and so with the oldest numpy that is supported.
RUNTIME_TESTS = $(shell grep -LE '^ *(import|from) +(torch|onnx|onnxscript|safetensors|export|sr3rt\.export|benchmarks)\b' tests/test_*.py \
	| grep -v test_package)
NUMPY1_WORKS := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info < (3, 13) else "")')

.PHONY: demo test test-numpy1 bench check clean
.DELETE_ON_ERROR:

demo: $(VENV_DEMO)
	.venv-demo/bin/sr3rt upscale -i examples/photo.png -o demo/photo.png --compare --overwrite
	@echo 'Results, in $(CURDIR)/demo:' && ls -1 demo

test: $(VENV) $(if $(NUMPY1_WORKS),test-numpy1)
	.venv/bin/python -m pytest
	$(if $(NUMPY1_WORKS),,@echo 'Not run: the tests with numpy 1.26, which has no wheels for Python 3.13 and later.')

test-numpy1: $(VENV_NUMPY1)
	.venv-numpy1/bin/python -m pytest -q $(RUNTIME_TESTS)

bench: $(VENV)
	.venv/bin/python -m pytest -q benchmarks/ $(BENCH)

check: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy sr3rt $(wildcard benchmarks)

$(VENV): $(NATIVE)
	@echo 'Making .venv with everything, torch included: a few minutes.'
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) --editable '.[cpu,export,bench,test]'
	@touch $@

$(VENV_DEMO): $(PACKAGE)
	@echo 'Making .venv-demo, without torch: about a minute.'
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP_INSTALL) '.[cpu]'
	@touch $@

$(VENV_NUMPY1): $(NATIVE)
	@echo 'Making .venv-numpy1, without torch: about a minute.'
	$(PYTHON) -m venv .venv-numpy1
	.venv-numpy1/bin/python $(PIP_INSTALL) --editable '.[cpu]' 'numpy==1.26.*' pytest scikit-image
	@touch $@

clean:
	rm -rf .venv .venv-demo .venv-numpy1 build dist demo .benchmarks benchmarks/.cache benchmarks/report .mypy_cache .pytest_cache .ruff_cache
