#!/usr/bin/env bash
# From a bare machine with Python 3.11+ to a trained model, then to a small study of all four arms and
# its report: 4 to 9 minutes on 2 CPU cores. A second call reuses everything that is there.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" report
workdir=runs/quickstart
study=studies/quickstart
.venv/bin/python -m qkjax.main --config=configs/muon_noqk.py:tiny --workdir="$workdir"
.venv/bin/python tools/run_study.py --config=configs/study.py:tiny,quick --workdir="$study"

echo
echo "Results of the run are in $workdir:"
echo "  summary.json    the last value of every metric"
echo "  metrics.jsonl   one line per step: loss, Participation Ratio of the keys, speed"
echo "  spectra/        singular values of the keys, per layer and head, at every evaluation"
echo "  parameters.txt  which optimiser updates which parameter"
echo "Another arm:"
echo "  source .venv/bin/activate"
echo "  qkjax train --config=adamw_qk:tiny --workdir=runs/adamw_qk"
echo "  qkjax compare $workdir runs/adamw_qk"
echo "The study, one seed and far too small for its question, as a page for a browser:"
echo "$PWD/$study/report/index.html"
