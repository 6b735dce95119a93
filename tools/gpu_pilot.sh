#!/usr/bin/env bash
# A part of the 25M-token pilot on a bare machine with one GPU, jax for CUDA and no network:
#
#   bash tools/collect_wheels.sh wheels                # before, where PyPI is in reach
#   bash tools/gpu_pilot.sh --wheels=wheels --part=b --minutes=9 --workdir=pilot --out=results \
#       --source='jsonl:edu.jsonl.xz' --weight=0.45 --source='jsonl:synthetic.jsonl.xz' --weight=0.55 \
#       --tokenizer=tokenizer.json
#
# Text is prepared as --source, --weight and --tokenizer say (as of prepare_data.py), or
# --data=DIR is a prepared dataset. --part: one of
#   a, b  recipe seed at 65,536 tokens a step: the four arms, one seed (a: step 0 of these runs)
#   c     their controls: gamma frozen, undecayed, decayed
#   d     a second and a third seed of b
#   e     recipe fixed: the four arms, frozen, decayed, two seeds
#   f     Muon on merged Q, K, V, O matrices, recipe fixed, two seeds
#   g     recipe seed at its own 4,096 tokens a step, one seed: AdamW+QK with gamma decayed and
#         undecayed, both Muon arms
# The same command again goes on where the time limit stopped it. Results, without checkpoints, are
# packed into at most 8 archives of 16 MiB in --out, whatever happens.
# --platform=cpu and --scale=tiny try it out; what follows `--` is passed to run_study.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gpu_set_up.sh"

[[ " $* " == *" --help "* ]] && gpu_help "${BASH_SOURCE[0]}"
flags="wheels part minutes workdir out data tokenizer platform scale"
wheels="" part="" minutes=9 workdir="" out="" data="" tokenizer="" platform=gpu scale=pilot
sources=() rest=()
gpu_parse "$@"

only=""
runs() { # SEED ARM...: as names of the plan's steps, in this order
  local seed="$1" arm
  for arm in "${@:2}"; do only+="${only:+,}runs/$arm/seed_$seed"; done
}
four=(adamw_qk adamw_noqk muon_noqk muon_qk)
case "$part" in
  a | b | c | d)
    study=seed_65536 recipe=seed end_of_text=false seeds='(42,137,43)'
    overrides='("train.tokens_per_step=65536",)'
    ;;
  e | f) study=fixed recipe=fixed end_of_text=true seeds='(42,137)' overrides='()' ;;
  g) study=seed_4096 recipe=seed end_of_text=false seeds='(42,)' overrides='()' ;;
  *) gpu_fail "--part: ${part:-missing}, expected one of a to g." ;;
esac
case "$part" in
  a | b) runs 42 "${four[@]}" ;;
  c) runs 42 {adamw,muon}_qk_{frozen,undecayed,decayed} ;;
  d) runs 137 "${four[@]}" && runs 43 "${four[@]}" ;;
  e) for seed in 42 137; do runs $seed "${four[@]}" {adamw,muon}_qk_{frozen,decayed}; done ;;
  f) for seed in 42 137; do runs $seed muon_noqk_merged; done ;;
  g) runs 42 adamw_qk adamw_qk_undecayed muon_qk muon_noqk ;;
esac
study="$workdir/$study" # one study for every setting, so that its parts share a directory

gpu_install
gpu_data "$end_of_text"
# No sweep: recipe fixed runs at its base rates, which docs/pilot.md says.
left="$(gpu_seconds_left 40)" # without what packing may take
status=0
timeout --preserve-status --signal=TERM --kill-after=30 "$left" \
  "$PYTHON" tools/run_study.py --config=configs/study.py:"$scale,$recipe" \
  --config.data_dir="$data" --config.seeds="$seeds" --config.overrides="$overrides" \
  --config.sweep.tokens=0 --config.export=false --only="$only" --workdir="$study" "${rest[@]}" ||
  status=$?
"$PYTHON" tools/make_report.py --workdir="$study" || echo "no report: see above" >&2
"$PYTHON" tools/pack_results.py --workdir="$study" --out="$out"
[ "$status" != 143 ] ||
  echo "stopped by the limit of $minutes minutes; the same command goes on where it stopped"
exit "$status"
