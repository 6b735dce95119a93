#!/usr/bin/env bash
# The wheels that a machine without network needs beside its own jax, flax, optax, orbax and numpy:
#   bash tools/airgapped/collect_wheels.sh DIR [PYTHON_VERSION=3.12]
# Run it on a machine that reaches PyPI, for the Python of the other machine; x86-64 Linux, 5 MB in all.
# NAME==VERSION behind these two adds further packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $# -lt 1 ]; then
  echo "ERROR: DIR: missing. Name the folder for the wheels: bash tools/airgapped/collect_wheels.sh DIR" >&2
  exit 2
fi
out="$1"
version="${2:-3.12}"
# In the core install, and on none of the images with jax that we have used. tensorflow-datasets is left out:
# it is a source of text only, and has dependencies without wheels.
names=(array_record clu dm-tree grain ml_collections portpicker tensorboardX)
pinned=()
for name in "${names[@]}"; do
  pinned+=("$(grep -iE "^${name//[-_]/[-_]}==" constraints.txt)")
done
platforms=()
for glibc in _2_28 _2_27 _2_24 _2_17 2014; do
  platforms+=(--platform "manylinux${glibc}_x86_64")
done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version "$version" "${platforms[@]}" --dest "$out" \
  "${pinned[@]}" "${@:3}"
ls "$out"
