# Two commands matter: `make demo` and `make test`. Both set everything up in .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo study ablations test test-all check parity benchmark cluster clean

setup: $(READY)

# torch first and pinned: as a dependency of something else, pip may take a newer build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "growmerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/growmerge run configs/quickstart.yaml

# The paper's graph in miniature, with three seeds of every adaptation.
study: $(READY)
	$(BIN)/growmerge run configs/paper/grow_up_and_merge.yaml --scale small

# Ways to grow, at two sizes, and the table of what they came to.
ablations: $(READY)
	$(BIN)/growmerge run configs/paper/ablations.yaml
	$(BIN)/growmerge run configs/paper/ablations.yaml --scale wider
	$(BIN)/python benchmarks/ablations.py runs/growth-ablations runs/growth-ablations-wider --out docs/ablations.md

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, a file's tests in one of them, in the order of the folders: else files of few, long tests come last.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST) -m "not covered"

# Recipes merged by mergekit 0.1.5 and by this project; the table is .parity/report.md.
parity: $(READY)
	$(BIN)/python -m pytest tests/merge/parity
	cat .parity/report.md

benchmark: $(READY)
	for script in $(filter-out benchmarks/ablations.py, $(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# A SLURM of four virtual nodes in the foreground; ctrl-C stops it.
cluster: $(READY)
	$(BIN)/python tests/cluster/cluster.py run

clean:
	rm -rf $(VENV) .parity runs
