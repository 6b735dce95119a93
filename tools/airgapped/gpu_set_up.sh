# Sourced by gpu_pilot.sh and gpu_benchmark.sh: flags, environment and data on a bare machine without
# network, whose python3 has jax, flax, optax, orbax and numpy. The wheels of collect_wheels.sh are
# put beside them; PYTHON names another interpreter.

PYTHON="${PYTHON:-python3}"

gpu_fail() { # MESSAGE
  echo "ERROR: $1" >&2
  exit 2
}

gpu_help() { # SCRIPT: its first comment
  sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "$1"
  exit 0
}

# Sets the variables named in $flags to their --name=value; `sources` and `rest` are arrays.
gpu_parse() { # ARGUMENT...
  local name
  while [ $# -gt 0 ]; do
    name="${1%%=*}"
    name="${name#--}"
    if [ "$1" = -- ]; then
      shift
      rest=("$@")
      break
    elif [[ "$1" == --*=* && " $flags " == *" $name "* ]]; then
      printf -v "$name" '%s' "${1#*=}"
    elif [[ "$1" == --source=* || "$1" == --weight=* ]]; then
      sources+=("$1")
    else
      gpu_fail "$1: unknown. See --help."
    fi
    shift
  done
  [ -f tools/airgapped/gpu_set_up.sh ] || gpu_fail "$PWD: not the repository's root. Change to it first."
  [ -n "$workdir" ] && [ -n "$out" ] || gpu_fail "--workdir, --out: missing. Give both."
  [[ "$minutes" =~ ^[1-9][0-9]*$ ]] ||
    gpu_fail "--minutes: $minutes, expected a whole number from 1."
  [[ "$scale" =~ ^(tiny|pilot)$ ]] || gpu_fail "--scale: $scale, expected pilot or tiny."
  if [ -z "$data" ] && { [ ${#sources[@]} = 0 ] || [ -z "$tokenizer" ]; }; then
    gpu_fail "--data: missing, and no --source with a --tokenizer. Give one or the other."
  fi
}

gpu_install() { # uses $wheels $workdir $platform
  local site="$workdir/site"
  if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || gpu_fail "--wheels: no folder $wheels. Make it with tools/airgapped/collect_wheels.sh."
    mkdir -p "$site"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
      --upgrade --target "$site" "$wheels"/*.whl
    site="$(cd "$site" && pwd)"
  fi
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  case "$platform" in
    gpu) export JAX_PLATFORMS=cuda,cpu ;;
    cpu) export JAX_PLATFORMS=cpu ;;
    *) gpu_fail "--platform: $platform, expected gpu or cpu." ;;
  esac
  # Without a GPU jax would fall back to the CPU, and a pilot there takes days.
  "$PYTHON" -c '
import sys, jax
device = jax.devices()[0]
print("jax", jax.__version__, "on", device.device_kind)
sys.exit(device.platform != sys.argv[1])' "$platform" ||
    gpu_fail "--platform: jax has no $platform here. Install jax for it, or see the message above."
}

# Sets $data to a dataset of the recipe, prepared from $sources where none is given.
gpu_data() { # END_OF_TEXT
  [ -n "$data" ] && return
  data="$workdir/data_end_of_text_$1"
  [ -f "$data/dataset.json" ] && return
  local length=2048 validation=1049600 # the first 1,048,576 tokens are the pilot's eval.tokens
  if [ "$scale" = tiny ]; then length=256 validation=100000; fi
  "$PYTHON" tools/prepare_data.py "${sources[@]}" --tokenizer="$tokenizer" --out="$data" \
    --sequence_length=$length --validation_tokens=$validation --end_of_text="$1"
}

gpu_seconds_left() { # RESERVED: of $minutes, counted from the start of the script
  local left=$((minutes * 60 - $1 - SECONDS))
  [ "$left" -gt 0 ] || gpu_fail "--minutes: $minutes are over before the work started. Give more."
  echo "$left"
}
