#!/usr/bin/env bash
# Benchmarks and determinism on a bare machine with one GPU, jax for CUDA and no network:
#
#   bash tools/airgapped/collect_wheels.sh wheels                # before, on a machine that reaches PyPI
#   bash tools/airgapped/gpu_benchmark.sh --wheels=wheels --minutes=9 --workdir=bench --out=results \
#       --source='jsonl:edu.jsonl.xz' --tokenizer=tokenizer.json
#
# --subjects=step,optimizer,attention,loss,eval are those of benchmarks/run.py, at --scale=pilot on
# the 88M; "" leaves them out. --determinism=default,deterministic trains 12 steps three times (the
# run, the same again, resumed) with the default flags and with --xla_gpu_deterministic_ops=true, and
# compares to the bit. Text or --data=DIR is for these runs, as of gpu_pilot.sh.
# Every part writes its own file to --out; parts that the time limit cuts off are named and not written.
# --platform=cpu and --scale=tiny try it out; what follows `--` is passed to check_determinism.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/gpu_set_up.sh"

[[ " $* " == *" --help "* ]] && gpu_help "${BASH_SOURCE[0]}"
flags="wheels minutes workdir out data tokenizer platform scale subjects determinism"
wheels="" minutes=9 workdir="" out="" data="" tokenizer="" platform=gpu scale=pilot
subjects=step,optimizer,attention,loss,eval determinism=default,deterministic
sources=() rest=()
gpu_parse "$@"

case "$scale" in
  pilot) shape=full step=65536 ;;
  tiny) shape=tiny step=2048 ;;
esac
for setting in ${determinism//,/ }; do
  case "$setting" in
    default | deterministic) ;;
    *) gpu_fail "--determinism: $setting, expected default, deterministic or both." ;;
  esac
done
gpu_install
mkdir -p "$out"

failed=()
limited() { # NAME COMMAND...: within what is left of the time; a failure stops no other part
  local name="$1" left=$((minutes * 60 - 10 - SECONDS))
  echo "== $name"
  if [ "$left" -le 0 ] || ! timeout --signal=TERM --kill-after=20 "$left" "${@:2}"; then
    failed+=("$name")
  fi
}

for subject in ${subjects//,/ }; do
  limited "$subject" "$PYTHON" benchmarks/run.py "$subject" --platform="$platform" \
    --shape="$shape" --out="$out/benchmark_$subject.json"
done

for setting in ${determinism//,/ }; do
  added=""
  if [ "$setting" = deterministic ] && [ "$platform" = gpu ]; then # unknown to some CPU builds
    added=--xla_gpu_deterministic_ops=true
  fi
  gpu_data true
  limited "determinism, $setting" env XLA_FLAGS="${XLA_FLAGS:-} $added" \
    "$PYTHON" tools/check_determinism.py --config=configs/muon_qk.py:"$scale" \
    --config.data.dir="$data" --config.train.tokens=$((12 * step)) \
    --config.checkpoint.every_tokens=$((6 * step)) '--config.eval.at_tokens=()' \
    --config.eval.tokens=16384 --config.eval.final_tokens=-1 \
    --workdir="$workdir/determinism_$setting" "${rest[@]}"
  if [ -f "$workdir/determinism_$setting/determinism.json" ]; then
    cp "$workdir/determinism_$setting/determinism.json" "$out/determinism_$setting.json"
  fi
done

if [ ${#failed[@]} -gt 0 ]; then
  printf 'not done, or found different: %s\n' "${failed[@]}" >&2
  exit 1
fi
