#!/bin/bash
# A study on a SLURM cluster: one job array per stage of the plan, one GPU per job.
#
#     bash examples/slurm_study.sh --config=configs/study.py --config.data_dir=DATA --workdir=DIR
#
# Flags are those of `qkjax study`. SBATCH holds more options of sbatch, such as "--partition=gpu
# --time=12:00:00"; PLAN_DIR names a folder that all nodes see, instead of this one. The same
# command, run again, queues the plan again: finished lines end at once.
set -euo pipefail

plan=$(mktemp "${PLAN_DIR:-$PWD}/plan.XXXXXX") # jobs read it: it stays, on a file system of all nodes
qkjax study "$@" --print_commands >"$plan"
after=()
for stage in $(grep -o 'stage [0-9]*' "$plan" | cut -d' ' -f2 | sort -nu); do
  lines=$(grep -n ", stage $stage, " "$plan" | cut -d: -f1 | paste -sd,)
  # afterany: one failed run must not stop the others; a line whose inputs are missing says so.
  # SLURM asks with SIGTERM 120 s before the limit: the run saves, and is queued again.
  job=$(sbatch --parsable --array="$lines" "${after[@]}" --gres=gpu:1 --signal=TERM@120 \
    --requeue ${SBATCH:-} \
    --wrap="srun bash -c \"\$(sed -n \${SLURM_ARRAY_TASK_ID}p '$plan')\"")
  after=("--dependency=afterany:$job")
  echo "stage $stage: job $job, lines $lines of $plan"
done
