"""What a dataset is made of: the options of `qkjax prepare`, checked, and two presets."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from qkjax import errors
from qkjax.data import tokenizer as tokenizer_lib

_STUDY: dict[str, Any] = {
    "sources": (
        "hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup",
        "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2",
    ),
    "weights": (0.7, 0.3),
    "tokenizer": "hf:HuggingFaceTB/SmolLM2-135M",
    "sequence_length": 2048,
    "train_tokens": 300_000_000,
    "validation_tokens": 5_000_000,
}
# Both find the same validation documents: the pilot is the study, stopped early.
PRESETS: dict[str, dict[str, Any]] = {
    "study": _STUDY,
    "pilot": {**_STUDY, "train_tokens": 25_000_000},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of a dataset.

    `weights` are shares of training tokens, one per source; one source needs none. `train_tokens`
    None means all of one source, or of a mix until the first source is used up. Token counts are
    rounded up to whole records. `benchmark_dir` holds the files of overlap.BENCHMARKS, "" counts
    no overlap with them; `decontaminate` drops training documents that share a 13-gram with them
    or with a validation document.
    """

    sources: tuple[str, ...]
    tokenizer: str
    weights: tuple[float, ...] = ()
    sequence_length: int = 2048
    train_tokens: int | None = None
    validation_tokens: int = 5_000_000
    end_of_text: bool = True
    eos_token: str = ""
    max_bad_lines: int = 0
    benchmark_dir: str = ""
    decontaminate: bool = False

    def __post_init__(self) -> None:
        if not self.weights and len(self.sources) == 1:
            object.__setattr__(self, "weights", (1.0,))
        problems = list(_problems(self))
        if problems:
            raise errors.UsageError(f"{'; '.join(problems)}. See --help.")

    def plain(self) -> dict[str, Any]:
        """The options as dataset.json holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def preset(name: str, **options: Any) -> Request:
    """The request of a preset ("" for none), with the options that were given explicitly.

    Other `sources` take the preset's weights away with its sources.
    Raises:
        UsageError: an unknown preset or bad options.
    """
    if name and name not in PRESETS:
        raise errors.UsageError(
            f"--preset={name}: unknown preset. Known are: {', '.join(PRESETS)}."
        )
    values = {"sources": (), "tokenizer": "", **PRESETS.get(name, {})}
    if "sources" in options:
        values["weights"] = ()
    return Request(**{**values, **options})


def _problems(request: Request) -> Iterator[str]:
    if not request.sources:
        yield "--source: missing, expected at least one"
    if not request.tokenizer:
        yield f"--tokenizer: missing, expected {' or '.join(tokenizer_lib.KINDS)}"
    if len(set(request.sources)) < len(request.sources):
        yield "--source: the same source is named twice"
    if len(request.weights) != len(request.sources):
        yield (
            f"--weight: expected one per source ({len(request.sources)}), "
            f"found {len(request.weights)}"
        )
    for weight in request.weights:
        if not (math.isfinite(weight) and weight > 0):
            yield f"--weight: expected a number above 0, found {weight}"
    smallest = {"sequence_length": 1, "validation_tokens": 1, "train_tokens": 1, "max_bad_lines": 0}
    for field, low in smallest.items():
        value = getattr(request, field)
        if value is not None and value < low:
            yield f"--{field}: expected at least {low}, found {value}"
