# make study | test | bench | clean        (make PYTHON=python3.12 … picks another interpreter)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What `make study` computes goes here, beside the records that the repository carries, and git ignores it.
LOCAL  ?= results/local

.PHONY: study test bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=…"; exit 2; }
	@echo "· making $(VENV) and installing the study (PyTorch is large: a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

study: $(VENV)/.ready  ## the small study, end to end, on the embedded images
	$(BIN)/mimstudy run semanticmim-t1 --scale laptop --data scenes --seeds 0 --jobs 2 --results $(LOCAL)

test: $(VENV)/.ready   ## every check: export and clean, ruff, notebooks, a papermill row, pytest
	BIN=$(abspath $(BIN)) bash tests/all.sh

bench: $(VENV)/.ready  ## what each method costs over a bare encoder
	$(BIN)/mimstudy bench --encoder vit_small_patch16_224 --batch 8

clean:
	rm -rf $(VENV) $(LOCAL) results/runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
