#!/usr/bin/env bash
# Installs servers that stand in for buckets, in .venv-buckets beside .venv (0.1 GB): without them the
# tests of tests/test_buckets.py that run commands against a server skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  source tools/set_up.sh test
fi
if [ ! -x .venv-buckets/bin/python ]; then
  .venv/bin/python -m venv --without-pip .venv-buckets
fi
_pins='
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print("\n".join(extras["bucket-servers"]))'
_wanted="$(.venv/bin/python -c "$_pins")"
if [ "$_wanted" != "$(cat .venv-buckets/installed 2>/dev/null)" ]; then
  echo "installing the extra bucket-servers into .venv-buckets"
  # shellcheck disable=SC2086
  .venv/bin/python -m pip --python .venv-buckets/bin/python install --quiet --disable-pip-version-check $_wanted
  echo "$_wanted" >.venv-buckets/installed
fi
