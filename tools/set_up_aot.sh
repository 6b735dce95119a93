#!/usr/bin/env bash
# Installs XLA's compiler for GPUs or TPUs that you do not have, in .venv-aot beside .venv (0.7 GB each).
#
#   bash tools/set_up_aot.sh gpu    # for --aot=h100 ...
#   bash tools/set_up_aot.sh tpu    # for --aot=v5e:2x4 ...
#
# .venv itself never contains these packages: if a plugin can be imported, jax gives other bits.
set -euo pipefail
case "${1:-}" in
  gpu | tpu) ;;
  *)
    echo "ERROR: $0: expected gpu or tpu, found '${1:-}'. Give one." >&2
    exit 2
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
_kind="$1"
if [ ! -x .venv/bin/python ]; then
  source tools/set_up.sh test
fi
if [ ! -x .venv-aot/bin/python ]; then
  .venv/bin/python -m venv --without-pip .venv-aot
fi
# Everything else is .venv's.
_pth='
import pathlib, sys, sysconfig
folder = next(pathlib.Path(".venv-aot").glob("lib/python*/site-packages"))
(folder / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")'
.venv/bin/python -c "$_pth"
_pins='
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print("\n".join(extras[f"aot-{sys.argv[1]}"]))'
_wanted="$(.venv/bin/python -c "$_pins" "$_kind")"
if [ "$_wanted" != "$(cat ".venv-aot/installed-$_kind" 2>/dev/null)" ]; then
  echo "installing the extra aot-$_kind into .venv-aot"
  # --no-deps: jax and jaxlib are .venv's.
  # shellcheck disable=SC2086
  .venv/bin/python -m pip --python .venv-aot/bin/python install --quiet --disable-pip-version-check --no-deps $_wanted
  echo "$_wanted" >".venv-aot/installed-$_kind"
fi
echo "the compiler is there: add --dry_run --aot=TARGET to a command (docs/targets.md)"
