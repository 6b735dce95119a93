"""Key dimensions of a public model: any decoder that transformers loads.

  qkjax measure --model=HuggingFaceTB/SmolLM2-135M --out=models/smollm2_135m
  qkjax measure --model=EleutherAI/pythia-160m --revision=step1000,step10000,step143000 \\
    --tokens_per_step=2097152 --out=models/pythia_160m
  qkjax measure --model=gemma-3-270m-q4_k_m.gguf --text=jsonl:texts.jsonl.xz --out=models/gemma3

Writes what an evaluation of a run writes (spectra/, validation/, metrics.jsonl), and model.json:
qkjax plot, compare and gallery read both. The same command, run again, measures what is missing.
Sources of --text are those of qkjax prepare. Needs torch and transformers (the extra [export]), and
[gguf] for GGUF files. What each number can and cannot say: docs/models.md.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line
from qkjax.report import drawing, figures

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model", None, "A directory, a name on the hub, or FILE.gguf.", flag_values=FLAGS
)
_REVISION = flags.DEFINE_list(
    "revision",
    [""],
    "Revisions on the hub, or folders inside the directory; several form a trajectory.",
    flag_values=FLAGS,
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Directory of the tokenizer, if the model has none.", flag_values=FLAGS
)
_TEXT = flags.DEFINE_string(
    "text",
    "",
    "A source of qkjax prepare. Default: the validation part of the embedded corpus.",
    flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 65_536, "Predicted tokens, in whole sequences.", lower_bound=1, flag_values=FLAGS
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length",
    None,
    "Tokens of a sequence. Default: 2048, or the model's maximum if that is less.",
    flag_values=FLAGS,
)
_SKIP_FIRST = flags.DEFINE_enum(
    "skip_first",
    "0",
    ["0", "1"],
    "1: leave the first position of every sequence out of the vectors.",
    flag_values=FLAGS,
)
_BOS = flags.DEFINE_bool(
    "bos",
    None,
    "Start every sequence with the BOS token. Default: as the tokenizer does.",
    flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "own"],
    "Type of the weights and the computation; own: that of the model's files.",
    flag_values=FLAGS,
)
_TRAINED_TOKENS = flags.DEFINE_float(
    "trained_tokens", None, "Tokens that the model was trained on, as published.", flag_values=FLAGS
)
_TOKENS_PER_STEP = flags.DEFINE_integer(
    "tokens_per_step",
    None,
    "Tokens of a training step, for revisions named by step.",
    flag_values=FLAGS,
)
_RANK_CURVES = flags.DEFINE_bool(
    "rank_curves", False, "Also measure the loss with projected keys.", flag_values=FLAGS
)
_RANK_TOKENS = flags.DEFINE_integer(
    "rank_tokens", 16_384, "Predicted tokens for --rank_curves.", lower_bound=1, flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Directory to write into.", flag_values=FLAGS)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_measure, FLAGS, __doc__)


def _measure() -> None:
    if not _MODEL.value:
        raise errors.UsageError("--model: missing. Name a directory, a hub name or FILE.gguf.")
    if not _OUT.value:
        raise errors.UsageError("--out: missing. Name a directory, --out=models/NAME.")

    from qkjax.observatory import directory, loading  # jax and all

    trained = _TRAINED_TOKENS.value
    request = directory.Request(
        source=loading.Source(_MODEL.value, _TOKENIZER.value),
        out=pathlib.Path(_OUT.value).absolute(),
        revisions=tuple(_REVISION.value or [""]),
        text=_TEXT.value,
        tokens=_TOKENS.value,
        sequence_length=_SEQUENCE_LENGTH.value,
        skip_first=_SKIP_FIRST.value == "1",
        bos=_BOS.value,
        dtype=_DTYPE.value,
        trained_tokens=None if trained is None else round(trained),
        tokens_per_step=_TOKENS_PER_STEP.value,
        rank_curves=_RANK_CURVES.value,
        rank_tokens=_RANK_TOKENS.value,
    )
    for curve in directory.measure_directory(request, functools.partial(print, flush=True)):
        figure = figures.rank_curves(curve.rows, curve.head_dim, curve.title)
        drawing.save(figure, curve.path.with_suffix(""), drawing.FORMATS)
