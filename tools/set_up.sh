# Sourced by the scripts beside it: creates .venv in the repository and installs the pinned versions.
# Usage: source tools/set_up.sh [EXTRAS]     for instance: source tools/set_up.sh test

_extras="${1:+[$1]}"
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$_root"

if [ ! -x .venv/bin/python ]; then
  _python=""
  for _candidate in python3 python3.11 python3.12 python3.13 python; do
    if "$_candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      _python="$_candidate"
      break
    fi
  done
  if [ -z "$_python" ]; then
    echo "ERROR: no Python 3.11 or newer on this machine. Install one (Debian: apt-get install python3)." >&2
    exit 2
  fi
  echo "creating .venv with $("$_python" --version)"
  if ! "$_python" -m venv .venv; then
    rm -rf .venv
    _minor="$("$_python" -c 'import sys; print(f"python3.{sys.version_info.minor}")')"
    echo "ERROR: $_python has no venv. Install it (Debian: apt-get install $_minor-venv) and run this again." >&2
    exit 2
  fi
fi

# Installs again only if the requirements have changed, or if this environment was made in another
# place: a copied checkout would run the original's code.
_digest='
import hashlib, pathlib, sys
root, *files = sys.argv[1:]
contents = b"".join(pathlib.Path(file).read_bytes() for file in files)
print(hashlib.sha256(root.encode() + contents).hexdigest())'
_wanted="$(.venv/bin/python -c "$_digest" "$_root" setup.py pyproject.toml constraints.txt)"
if ! grep -qxF -- "$_wanted $_extras" .venv/installed 2>/dev/null; then
  echo "installing qkjax$_extras with the versions of constraints.txt"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$_extras"
  grep "^$_wanted " .venv/installed >.venv/installed.new 2>/dev/null || true
  echo "$_wanted $_extras" >>.venv/installed.new
  mv .venv/installed.new .venv/installed
fi
