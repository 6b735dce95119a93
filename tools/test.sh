#!/usr/bin/env bash
# Lint, types and tests, in an environment of its own making.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest -n 2 "$@"
