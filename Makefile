# make study | test | bench | clean        (make PYTHON=python3.12 … uses another interpreter)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The results of `make study`, apart from the records in the repository; git ignores this folder.
LOCAL  ?= results/local

.PHONY: study test bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; choose one with make PYTHON=…"; exit 2; }
	@echo "· creating $(VENV) and installing the study (PyTorch is large: a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

study: $(VENV)/.ready  ## the small study, end to end, on procedural scenes
	$(BIN)/mimstudy run semanticmim-t1 --scale laptop --data scenes --seeds 0 --jobs 2 --results $(LOCAL)

test: $(VENV)/.ready   ## all checks: export and clean, ruff, notebooks, every method through papermill, pytest
	BIN=$(abspath $(BIN)) bash tests/all.sh

bench: $(VENV)/.ready  ## time and memory of each method's training step, relative to the encoder alone
	$(BIN)/mimstudy bench --encoder vit_small_patch16_224 --batch 8

clean:
	rm -rf $(VENV) $(LOCAL) results/runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
