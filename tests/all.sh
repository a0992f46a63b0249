#!/usr/bin/env bash
# Every check, in the order of their price. BIN is the folder of the environment's programs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1 MPLBACKEND=agg
say() { printf '\n== %s\n' "$*"; }
# what the working tree looks like, whether or not it is under git
state() { if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then git status --porcelain=v1 && git diff -- nbs mimstudy; else find nbs mimstudy -name '*.ipynb' -o -name '*.py' | sort | xargs cksum; fi; }

say "notebooks and modules agree, and notebooks are clean"
before=$(state | cksum)
nbdev-export
nbdev-clean
[ "$before" = "$(state | cksum)" ] || { echo "error: nbdev-export or nbdev-clean changed something; commit its result"; git --no-pager diff --stat 2>/dev/null || true; exit 1; }

say "ruff"
ruff check mimstudy tests

say "every notebook, cell by cell"
OMP_NUM_THREADS=1 nbdev-test --n-workers 2

say "every method through papermill, at smoke scale"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mimstudy run all-methods --scale smoke --jobs 2 --results "$out"

say "pytest"
python -m pytest
