#!/usr/bin/env bash
# Lint, types and tests, in an environment of its own making.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy  # by python: in a copied environment scripts start the original's
.venv/bin/python -m pytest -n 2 "$@"
