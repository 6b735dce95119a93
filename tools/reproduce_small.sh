#!/usr/bin/env bash
# Reproduces published runs of laptop size: their commit, its environment, the same commands, and the comparison.
#
#   bash tools/reproduce_small.sh original                         # every published run: AdamW 27 min of a core, Muon 47
#   bash tools/reproduce_small.sh fixed                            # and the sweep of 20 short runs that chose its rates
#   bash tools/reproduce_small.sh original adamw_noqk/seed_42 ...  # only these
#
# In reproduced/small_RECIPE; the same command, run again, resumes. Exit code 0: equal to the bit (P1), or as close as
# seeds are (P3), and the output says which; 2: another corpus, or farther apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe="${1:-}"
published="docs/results/small_$recipe"
if [ -z "$recipe" ] || [ ! -d "$published/runs" ]; then
  echo "ERROR: $0: '$recipe' has no published runs. Give one of: $(cd docs/results && echo small_*/ | sed 's/small_//g; s,/,,g')" >&2
  exit 2
fi
shift
out="$PWD/reproduced/small_$recipe"
mkdir -p "$out/published/runs"
cp -r "$published"/{study.json,dataset.json,surgery} "$out/published/"
[ "$recipe" = original ] || cp -r "$published/sweep" "$out/published/"
names=()
for archive in "$published"/runs/*.tar.gz; do
  name="$(basename "$archive" .tar.gz)"
  arm="${name%_seed_*}"
  names+=("$arm/seed_${name##*_}")
  mkdir -p "$out/published/runs/$arm"
  tar -xzf "$archive" -C "$out/published/runs/$arm"
done
for name in "$@"; do
  if [[ " ${names[*]} " != *" $name "* ]]; then
    echo "ERROR: $0: $name is not published. Give some of: ${names[*]}" >&2
    exit 2
  fi
done
[ $# -eq 0 ] || names=("$@")

# The code that made the runs, in its own clone and environment.
_sha='
import json, pathlib, sys
print({json.loads(p.read_text())["git"]["sha"] for p in pathlib.Path(sys.argv[1]).glob("runs/*/*/environment.json")}.pop())'
commit="$(python3 -c "$_sha" "$out/published")"
if [ ! -d "$out/code" ]; then
  if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
    echo "ERROR: $0: commit $commit is not in this clone. Fetch it: git fetch --unshallow" >&2
    exit 2
  fi
  git clone --quiet --no-checkout . "$out/code.part"
  git -C "$out/code.part" checkout --quiet --detach "$commit"
  mv "$out/code.part" "$out/code"
fi
(cd "$out/code" && source tools/set_up.sh report)

only="dataset"
for name in "${names[@]}"; do
  [ "$recipe" = original ] || only+=",sweep/${name%%/*}/*"
  only+=",runs/$name,surgery/$name"
done
words="small$([ "$recipe" = fixed ] || echo ",$recipe")"
(cd "$out/code" && .venv/bin/python tools/run_study.py "--config=configs/study.py:$words" --config.export=False \
  "--workdir=$out/study" "--only=$only")

# The present code compares.
source tools/set_up.sh report
.venv/bin/python tools/compare_studies.py "--published=$out/published" "--workdir=$out/study"
