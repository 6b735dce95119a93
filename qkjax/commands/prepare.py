"""Text to a dataset: whole-document hold-out, tokens, shards. To resume a killed run, run it again.

  qkjax prepare --preset=study --out=data/study
  qkjax prepare --source='jsonl:web/*.jsonl.xz:text' --weight=0.7 \\
    --source='parquet:books/*.parquet:text' --weight=0.3 \\
    --tokenizer=hf:HuggingFaceTB/SmolLM2-135M --train_tokens=300000000 --out=data/mix

Sources: hf:DATASET[:CONFIG][:SPLIT][:COLUMN] (streamed from the hub, or a local directory),
tfds:NAME[:SPLIT][:FEATURE], parquet:GLOB[:COLUMN], jsonl:GLOB[:FIELD] (plain, .gz, .xz, .zst),
text:GLOB (every file is a document), docstrings. COLUMN, FIELD and FEATURE are "text", SPLIT is
"train", unless named. More in docs/data.md. Check the result: qkjax check.
"""

from typing import Any

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, startup

FLAGS = flags.FlagValues()
_PRESET = flags.DEFINE_string(
    "preset",
    "",
    "study (300M training tokens of smollm-corpus) or pilot (25M); flags override it.",
    flag_values=FLAGS,
)
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "Where documents come from; repeatable.", flag_values=FLAGS
)
_WEIGHT = flags.DEFINE_multi_float(
    "weight",
    [],
    "Share of the training tokens, one for every --source, in order.",
    flag_values=FLAGS,
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "",
    "train:SIZE (byte-level BPE on the training documents), a tokenizer.json, or hf:NAME.",
    flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Directory to create, here or at gs:// or s3://; new or empty.",
    flag_values=FLAGS,
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 2048, "Predicted tokens of a record.", flag_values=FLAGS
)
_TRAIN_TOKENS = flags.DEFINE_integer(
    "train_tokens",
    None,
    "Training tokens. Default: all of the source or mix.",
    flag_values=FLAGS,
)
_VALIDATION_TOKENS = flags.DEFINE_integer(
    "validation_tokens", 5_000_000, "Validation tokens, from held-out documents.", flag_values=FLAGS
)
_END_OF_TEXT = flags.DEFINE_bool(
    "end_of_text", True, "Put an end-of-text token after every document.", flag_values=FLAGS
)
_EOS_TOKEN = flags.DEFINE_string(
    "eos_token",
    "",
    "The end-of-text token, if it is not <|endoftext|>, </s> or <eos>.",
    flag_values=FLAGS,
)
_MAX_BAD_LINES = flags.DEFINE_integer(
    "max_bad_lines", 0, "Bad jsonl lines to skip, per source.", flag_values=FLAGS
)
_BENCHMARK_DIR = flags.DEFINE_string(
    "benchmark_dir",
    "",
    "Holds hellaswag*.jsonl, lambada*.jsonl: count 13-grams shared with them.",
    flag_values=FLAGS,
)
_DECONTAMINATE = flags.DEFINE_bool(
    "decontaminate",
    False,
    "Drop training documents that share a 13-gram with a validation document or a benchmark.",
    flag_values=FLAGS,
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that encode text (default: all cores); the result is the same.",
    flag_values=FLAGS,
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_prepare, FLAGS, __doc__, buckets=["out"])


def _prepare() -> None:
    from qkjax.data import prepare, request

    if not _OUT.value:
        raise errors.UsageError("--out: missing, expected the directory to make. See --help.")
    workers = startup.cpu_count() if _WORKERS.value is None else _WORKERS.value
    if workers < 1:
        raise errors.UsageError(f"--workers: expected at least 1, found {workers}. See --help.")
    options: dict[str, Any] = {
        "sources": _SOURCE,
        "weights": _WEIGHT,
        "tokenizer": _TOKENIZER,
        "sequence_length": _SEQUENCE_LENGTH,
        "train_tokens": _TRAIN_TOKENS,
        "validation_tokens": _VALIDATION_TOKENS,
        "end_of_text": _END_OF_TEXT,
        "eos_token": _EOS_TOKEN,
        "max_bad_lines": _MAX_BAD_LINES,
        "benchmark_dir": _BENCHMARK_DIR,
        "decontaminate": _DECONTAMINATE,
    }
    given = {
        name: tuple(flag.value) if isinstance(flag.value, list) else flag.value
        for name, flag in options.items()
        if flag.present
    }
    prepare.prepare(request.preset(_PRESET.value, **given), _OUT.value, workers=workers)
