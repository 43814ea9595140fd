# make demo    upscale a photograph in a fresh environment without torch
# make test    every test, in an environment of its own; PIP_EXTRA_INDEX_URL with PyTorch's CPU index saves a large download
# make bench   time every contender that runs here: benchmarks/report/report.html; for believable figures, on a quiet machine
# make check   lint, format, types
# make clean   remove environments and everything built

PYTHON ?= python3
# Compiled is what is imported, when it first is: less than half of what is installed, which saves a minute.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

VENV = .venv/.stamp
VENV_DEMO = .venv-demo/.stamp
VENV_SERVE = .venv-serve/.stamp

NATIVE := pyproject.toml CMakeLists.txt $(wildcard sr3rt/native/*)
PACKAGE := $(NATIVE) LICENSE README.md $(shell find sr3rt export triton_repo -type f -not -name '*.pyc' -not -name '*.so')
# What runs without the export extra.
RUNTIME_TESTS = $(shell grep -LE '^ *(import|from) +(torch|onnx|safetensors|export|sr3rt\.export|benchmarks)\b' tests/test_*.py \
	| grep -v test_package)
# The lowest versions that pyproject.toml admits of what runs, but for NumPy, of which Triton decides.
OLDEST = $(shell $(SERVE_PYTHON) -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	needed = project['dependencies'] + project['optional-dependencies']['cpu']; \
	print(*(one.replace('>=', '==') for one in needed if not one.startswith('numpy')))")
# NumPy 1.26, which Triton needs, has no wheels for Python 3.13 and later.
SERVE_PYTHON ?= $(shell for python in $(PYTHON) python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

.PHONY: demo test test-serve bench check clean
.DELETE_ON_ERROR:

demo: $(VENV_DEMO)
	.venv-demo/bin/sr3rt upscale -i examples/photo.png -o demo/photo.png --compare --overwrite
	@echo 'Results, in $(CURDIR)/demo:' && ls -1 demo

test:
	$(MAKE) --jobs 2 $(VENV) $(VENV_SERVE)  # one unpacks while the other compiles
	$(MAKE) test-serve
	.venv/bin/python -m pytest -n 2 --dist loadfile

# What needs no torch, with the oldest versions of what it does need; and everything that asks a real Triton Inference Server.
test-serve: $(VENV_SERVE)
	.venv-serve/bin/python -m pytest -q tests/server
	.venv-serve/bin/python -m pytest -q -n 2 --dist loadfile $(RUNTIME_TESTS)

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
	.venv-demo/bin/python $(PIP_INSTALL) .
	@touch $@

$(VENV_SERVE): $(NATIVE)
	@test -n '$(SERVE_PYTHON)' || { echo 'No Python 3.11 or 3.12 is here: Triton Inference Server cannot be tested. Install one.'; exit 1; }
	@echo 'Making .venv-serve, with Triton Inference Server and without torch: about a minute.'
	$(SERVE_PYTHON) -m venv .venv-serve
	.venv-serve/bin/python $(PIP_INSTALL) --editable '.[cpu,serve]' $(OLDEST) pytest pytest-xdist scikit-image \
		|| { echo 'Triton Inference Server could not be installed: its tests cannot run, and so `make test` fails.'; exit 1; }
	@touch $@

clean:
	rm -rf .venv .venv-demo .venv-serve build dist demo .benchmarks benchmarks/.cache benchmarks/report .mypy_cache .pytest_cache .ruff_cache
