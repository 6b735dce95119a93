#!/usr/bin/env bash
# A part of the 25M-token pilot on a bare machine with one GPU, jax for CUDA and no network:
#
#   bash tools/airgapped/collect_wheels.sh wheels                # before, on a machine that reaches PyPI
#   bash tools/airgapped/gpu_pilot.sh --wheels=wheels --part=b --minutes=9 --workdir=pilot --out=results \
#       --source='jsonl:edu.jsonl.xz' --weight=0.45 --source='jsonl:synthetic.jsonl.xz' --weight=0.55 \
#       --tokenizer=tokenizer.json
#
# Text is prepared as --source, --weight and --tokenizer say (as for prepare_data.py), or
# --data=DIR is a prepared dataset. --part: one of
#   a, b  recipe original at 65,536 tokens a step: the four arms, one seed (a is b, for its first steps)
#   c     the same with the controls (gamma frozen, undecayed, decayed), two seeds, by itself
#   d     a second and a third seed of b
#   e     recipe fixed: the four arms, frozen, decayed, two seeds
#   f     recipe fixed: Muon on separate and on merged Q, K, V, O matrices, two seeds
#   g     recipe original at its own 4,096 tokens a step, one seed: AdamW+QK with gamma decayed and
#         undecayed, both Muon arms
# The same command, run again, resumes after the time limit. Results, without checkpoints, are always
# packed, into at most 8 archives of 16 MiB in --out.
# --platform=cpu and --scale=tiny try it out; what follows `--` is passed to run_study.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gpu_set_up.sh"

[[ " $* " == *" --help "* ]] && gpu_help "${BASH_SOURCE[0]}"
flags="wheels part minutes workdir out data tokenizer platform scale"
wheels="" part="" minutes=9 workdir="" out="" data="" tokenizer="" platform=gpu scale=pilot
sources=() rest=()
gpu_parse "$@"

# Every study is planned with exactly the arms and seeds that its parts train: a seed that lacks an
# arm of the plan enters no contrast.
recipe=original end_of_text=false seeds='(42,137)' overrides='("train.tokens_per_step=65536",)' only=run
arms=adamw_qk,adamw_noqk,muon_qk,muon_noqk controls='()'
case "$part" in
  a | b) study=original_65536 seeds='(42,137,43)' only='runs/*/seed_42' ;;
  c)
    study=original_65536_controls
    controls=adamw_qk_frozen,adamw_qk_undecayed,adamw_qk_decayed
    controls+=,muon_qk_frozen,muon_qk_undecayed,muon_qk_decayed
    ;;
  d) study=original_65536 seeds='(42,137,43)' only='runs/*/seed_137,runs/*/seed_43' ;;
  e)
    study=fixed recipe=fixed end_of_text=true overrides='()'
    controls=adamw_qk_frozen,adamw_qk_decayed,muon_qk_frozen,muon_qk_decayed
    ;;
  f)
    study=fixed_merged recipe=fixed end_of_text=true overrides='()'
    arms=muon_noqk controls=muon_noqk_merged
    ;;
  g)
    study=original_4096 seeds='(42,)' overrides='()'
    arms=adamw_qk,muon_qk,muon_noqk controls=adamw_qk_undecayed
    ;;
  *) gpu_fail "--part: ${part:-missing}, expected one of a to g." ;;
esac
study="$workdir/$study"

gpu_install
gpu_data "$end_of_text"
# No sweep: recipe fixed runs at its base rates, which docs/pilot.md says.
left="$(gpu_seconds_left 40)" # without what packing may take
status=0
timeout --preserve-status --signal=TERM --kill-after=30 "$left" \
  "$PYTHON" tools/run_study.py --config=configs/study.py:"$scale,$recipe" \
  --config.data_dir="$data" --config.arms="$arms" --config.controls="$controls" \
  --config.optional_controls='()' --config.seeds="$seeds" --config.overrides="$overrides" \
  --config.sweep.tokens=0 --config.export=false --only="$only" --workdir="$study" "${rest[@]}" ||
  status=$?
"$PYTHON" tools/make_report.py --workdir="$study" || echo "no report: see above" >&2
"$PYTHON" tools/airgapped/pack_results.py --workdir="$study" --out="$out"
[ "$status" != 143 ] ||
  echo "stopped by the limit of $minutes minutes; the same command resumes"
exit "$status"
