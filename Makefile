# `make demo` and `make test` do everything: each makes .venv, installs the pinned versions, runs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_VENV := build/docs-venv
DOCS_STAMP := $(DOCS_VENV)/.installed

.PHONY: demo test test-faults test-portable test-install test-docs docs lint clean
demo: $(STAMP)
	$(BIN)/mpq demo --force

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The long form of tests/faults, which writes the table of docs/security.md, and of other inputs.
test-faults: $(STAMP)
	MPQ_FAULTS=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/faults
	MPQ_FAULTS=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/test_inputs.py

# Every block of README and docs, word for word, each page in an empty folder.
test-docs: $(STAMP)
	MPQ_DOCS=1 $(BIN)/python -m pytest tests/test_readme.py

# The site, in build/site/html: pages are made with mpq, the site in an environment of its own, which
# has what the extra `docs` names and nothing else. Warnings are errors.
docs: $(STAMP) $(DOCS_STAMP)
	$(BIN)/python docs/stage.py build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --config-file build/site/mkdocs.yml
	@echo "open build/site/html/index.html"

# The wheel as a newcomer has it: a fresh environment, no checkout, `mpq demo` in an empty folder.
test-install: $(STAMP)
	rm -rf build/wheel build/fresh && mkdir -p build/wheel build/fresh/empty
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv build/fresh/venv
	build/fresh/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build/fresh/empty && ../venv/bin/mpq doctor && ../venv/bin/mpq demo

# The other runtimes of docs/portability.md, installed below build/runtimes-other and really run; what
# cannot be installed is skipped with the reason.
test-portable: $(STAMP)
	MPQ_PORTABLE=1 MPQ_RUNTIMES=$(abspath build/runtimes-other) OMP_NUM_THREADS=1 \
		OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -rs tests/test_portability.py \
		tests/test_probe.py tests/test_browser.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/size.py
	@# mypy maps no directory onto another package: it reads a copy laid out as installed.
	rm -rf build/typed && mkdir -p build/typed
	cp -r mpq build/typed/mpq && cp -r export policies build/typed/mpq/
	cd build/typed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml
	cp -r benchmarks build/typed/
	cd build/typed && MYPYPATH=benchmarks $(abspath $(BIN))/mypy --config-file ../../.ci/benchmarks.ini \
		$(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py)) -m benchmarks.study.__main__

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS_STAMP): pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r $(DOCS_VENV)/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
