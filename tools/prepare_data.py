"""Text to a dataset: whole-document hold-out, tokens, shards. A killed run is simply run again.

  python tools/prepare_data.py --source=docstrings --tokenizer=train:4096 --sequence_length=256 \\
    --validation_tokens=100000 --out=data/embedded
  python tools/prepare_data.py --source='jsonl:web/*.jsonl.xz:text' --weight=0.7 \\
    --source='parquet:books/*.parquet:text' --weight=0.3 --tokenizer=tokenizer.json \\
    --train_tokens=300000000 --out=data/mix

Sources: docstrings, jsonl:GLOB[:FIELD] (plain, .gz, .xz), parquet:GLOB[:COLUMN], text:GLOB (every
file a document). FIELD and COLUMN are "text" unless named. Check the result: tools/check_data.py.
"""

from absl import flags

from qkjax import command_line, errors

_SOURCE = flags.DEFINE_multi_string("source", [], "Where documents come from; repeatable.")
_WEIGHT = flags.DEFINE_multi_float(
    "weight", [], "Share of the training tokens, one for every --source, in order."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "train:SIZE (byte-level BPE on the training documents) or a tokenizer.json."
)
_OUT = flags.DEFINE_string("out", "", "Directory to make; new or empty.")
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Predicted tokens of a record.")
_TRAIN_TOKENS = flags.DEFINE_integer(
    "train_tokens", None, "Training tokens; all of one source, or of a mix, unless given."
)
_VALIDATION_TOKENS = flags.DEFINE_integer(
    "validation_tokens", 5_000_000, "Tokens of held-out documents."
)
_END_OF_TEXT = flags.DEFINE_bool("end_of_text", True, "End-of-text token after every document.")
_EOS_TOKEN = flags.DEFINE_string(
    "eos_token", "", "The end-of-text token, where it is not <|endoftext|>, </s> or <eos>."
)
_MAX_BAD_LINES = flags.DEFINE_integer("max_bad_lines", 0, "Bad jsonl lines to skip, per source.")


def main() -> None:
    from qkjax.data import prepare

    if not _OUT.value:
        raise errors.UsageError("--out: missing, expected the directory to make. See --help.")
    request = prepare.Request(
        sources=tuple(_SOURCE.value),
        weights=tuple(_WEIGHT.value),
        tokenizer=_TOKENIZER.value,
        sequence_length=_SEQUENCE_LENGTH.value,
        train_tokens=_TRAIN_TOKENS.value,
        validation_tokens=_VALIDATION_TOKENS.value,
        end_of_text=_END_OF_TEXT.value,
        eos_token=_EOS_TOKEN.value,
        max_bad_lines=_MAX_BAD_LINES.value,
    )
    prepare.prepare(request, _OUT.value)


if __name__ == "__main__":
    command_line.run(main)
