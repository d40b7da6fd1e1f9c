# Everything a fresh machine needs: python3 (3.11-3.13), git, make.
PYTHON ?= python3
UV = 0.13.9
RUN = .venv/bin/python

.PHONY: demo dashboard test test-all test-browser test-faults bench lint clean-demo

INSTALL = .venv/bin/uv pip install --python $(RUN) --compile-bytecode --build-constraints build-constraints.txt

# One environment, made once and again whenever the pins change.
.venv/.ready: requirements.txt build-constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and \
	  f"error: Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet uv==$(UV)
	$(INSTALL) --requirement requirements.txt
	@touch $@

# What the tests need besides.
.venv/.ready-dev: .venv/.ready requirements-dev.txt
	$(INSTALL) --requirement requirements.txt --requirement requirements-dev.txt
	@touch $@

demo: .venv/.ready  ## train both stages on emoji, draw samples (10 minutes on two cores)
	$(RUN) experiments/demo.py

dashboard: .venv/.ready  ## the server of the dashboard, for this machine alone (others: FLAGS="--address 0.0.0.0")
	@exec $(RUN) experiments/dashboard.py $(FLAGS)

test: .venv/.ready-dev  ## all tests but the slow ones and those in a browser
	$(RUN) -m pytest -m "not slow and not browser" tests

test-all: .venv/.ready-dev  ## all tests
	$(RUN) -m pytest tests

test-browser: .venv/.ready-dev  ## the dashboard in Chromium, where it is installed
	$(RUN) -m pytest -m browser tests/display

test-faults: .venv/.ready-dev  ## kills, full disks, damaged files and hostile input, in full numbers
	FAULTS=full $(RUN) -m pytest tests/faults

bench: .venv/.ready  ## each job beside its plain form: throughput, ratio, memory
	$(RUN) experiments/benchmark.py

lint: .venv/.ready-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean-demo:  ## forget the demo's runs, so that `make demo` starts afresh
	rm -rf logs/demo_vqgan logs/demo_absorbing logs/demo_samples
