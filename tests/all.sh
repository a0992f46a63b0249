#!/usr/bin/env bash
# All checks, the quickest first. BIN is the folder of the environment's programs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1 MPLBACKEND=agg

step() { printf '\n== %s\n' "$*"; }

# The state of notebooks and package, with or without git.
state() {
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git status --porcelain=v1 && git diff -- nbs mimstudy
    else
        find nbs mimstudy -name '*.ipynb' -o -name '*.py' | sort | xargs cksum
    fi
}

step "notebooks and package agree, and notebooks are clean"
before=$(state | cksum)
nbdev-export
nbdev-clean
if [ "$before" != "$(state | cksum)" ]; then
    echo "error: nbdev-export or nbdev-clean changed something; commit the result"
    git --no-pager diff --stat 2>/dev/null || true
    exit 1
fi

step "ruff"
ruff check nbs mimstudy tests

step "pages are as new as their records"
mimstudy report --check --results results

step "every notebook, cell by cell"
OMP_NUM_THREADS=1 nbdev-test --n-workers 2

step "every method through papermill, at smoke scale"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mimstudy run all-methods --scale smoke --jobs 2 --results "$out"

step "pytest"
python -m pytest
