#!/usr/bin/env bash
# Compiles every preset for every target, and writes the table of docs/targets.md. About an hour of CPU.
#
#   bash tools/set_up_aot.sh gpu && bash tools/set_up_aot.sh tpu
#   bash tools/check_targets.sh                     # all of it
#   bash tools/check_targets.sh h100 full muon_qk   # a target, a scale and an arm of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m qkjax.targets.matrix "$@"
