#!/usr/bin/env bash
# Lint, types and tests, in an environment that this script creates.
#
#   bash tools/test.sh          # pytest takes about 12 minutes on 2 free cores
#   bash tools/test.sh --all    # with the tests marked `long`: simulations, fuzzing, whole commands
#   bash tools/test.sh --long   # only those
#
# Further arguments go to pytest.
set -euo pipefail

chosen=(-m "not long")
case "${1:-}" in
  --all) chosen=() && shift ;;
  --long) chosen=(-m long) && shift ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy  # by python: in a copied environment scripts start the original's
.venv/bin/python -m pytest -n logical --dist loadfile "${chosen[@]}" "$@"
