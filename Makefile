# All commands set up .venv themselves; python3, make and a package index are enough.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

INTEGRATIONS := .venv-integrations
INTEGRATIONS_INSTALLED := $(INTEGRATIONS)/.installed

.PHONY: bench build coverage demo docs lint mutations picture soak test test-gpu test-integrations types
.DEFAULT_GOAL := test

# The tests start many processes: each would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

$(INSTALLED): pyproject.toml setup.py constraints.txt
	python3 -m venv $(VENV)
	# Python compiles what it imports, a small part of what is installed.
	$(PYTHON) -m pip install --quiet --no-compile --constraint constraints.txt \
		--editable '.[bench,docs,release,test]'
	touch $@

# Trains a small normalizer-free network with and without AGC, then measures a step on NFNet-F0.
demo: $(INSTALLED)
	$(PYTHON) -m benchmarks.digits
	$(PYTHON) -m benchmarks.throughput --quick

# Step time and bandwidth beside other implementations.
bench: $(INSTALLED)
	$(PYTHON) -m benchmarks.throughput --plot

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/lint-imports

types: $(INSTALLED)
	$(PYTHON) -m mypy

test: lint types
	$(PYTHON) -m pytest --numprocesses auto --dist worksteal

# README, docs/ and the API reference, in build/site; a broken link is an error.
docs: $(INSTALLED)
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees -c docs . build/site

# The wheel and the sdist, in dist/.
build: $(INSTALLED)
	rm -rf dist
	$(PYTHON) -m build --outdir dist

$(INTEGRATIONS_INSTALLED): pyproject.toml setup.py constraints-integrations.txt
	python3 -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --constraint constraints-integrations.txt \
		--editable '.[integrations]'
	touch $@

# Models and trainers of timm, transformers, Lightning and Accelerate, in an environment of their own.
# Packages are all that is fetched: models are made from small configurations.
test-integrations: $(INTEGRATIONS_INSTALLED)
	HF_HUB_OFFLINE=1 $(INTEGRATIONS)/bin/python -m pytest -W default tests/integrations

# The suite with a Python that has torch, triton, pytest, hypothesis and expecttest, on its GPU if there
# is one: make test-gpu PYTHON=python3. Nothing is installed; what needs more is left out.
test-gpu:
	$(PYTHON) -m pytest -p no:benchmark -p no:cacheprovider

# What takes minutes: thousands of steps, many random sequences of operations, whole cross products.
soak: $(INSTALLED)
	$(PYTHON) -m pytest -m soak --numprocesses auto --dist worksteal

# Lines and branches that the tests do not reach; docs/coverage.md says why.
coverage: $(INSTALLED)
	$(PYTHON) -m coverage run -m pytest
	$(PYTHON) -m coverage report

# Plants small faults in copies of the tree, one at a time; the tests must find each.
mutations: $(INSTALLED)
	$(PYTHON) -m tests.meta.mutations

# Who imports whom, drawn from the code for docs/architecture.md; needs graphviz's dot.
picture: $(INSTALLED)
	$(PYTHON) docs/picture.py
