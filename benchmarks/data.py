"""Speed of preparing and reading data, against bare `tokenizers`."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from qkjax import errors
from qkjax.cli import startup

_LOADER_SECONDS = 3.0
_BATCH_SEQUENCES = 32
# Each in a process of its own: threads and their number are settled once a process.
_BARE = """
import json, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
start = time.perf_counter()
encodings = tokenizer.encode_batch(texts)
seconds = time.perf_counter() - start
print(sum(len(encoding) for encoding in encodings) / seconds)
"""
_LOADER = """
import sys, time
import qkjax
from qkjax.cli import startup
startup.stay_on_one_cpu()
qkjax.prepare_process()
from qkjax.data import manifest, pipeline
read = manifest.load(sys.argv[1])
loader = pipeline.TrainLoader(sys.argv[1], read, seed=0, sequences_per_step=int(sys.argv[2]))
next(loader)
count, start = 0, time.perf_counter()
while time.perf_counter() - start < float(sys.argv[3]):
    next(loader)
    count += 1
print(count * int(sys.argv[2]) * read.sequence_length / (time.perf_counter() - start))
"""
_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Request:
    """What text is prepared, and how often."""

    source: str  # as prepare_data.py takes it
    tokenizer: str  # likewise; a trained one is trained before the measurement
    characters: int  # how much of the source
    sequence_length: int
    rounds: int


def measure(
    request: Request, folder: pathlib.Path, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Tokens/s of encode_batch and prepare_data on all cores, and of the loader on one.

    Every round measures each of them once.

    Returns:
        The rounds' figures, their medians, and the median ratio of prepare_data to encode_batch.
    """
    tokenizer, text = _write_inputs(request, folder, report)
    figures: dict[str, list[float]] = {"encode_batch": [], "prepare_data": [], "loader": []}
    for number in range(request.rounds):
        out = folder / f"dataset-{number}"
        figures["encode_batch"].append(_run(_BARE, tokenizer, text))
        figures["prepare_data"].append(_prepare(request, tokenizer, text, out))
        figures["loader"].append(_run(_LOADER, out, _BATCH_SEQUENCES, _LOADER_SECONDS))
        report(f"round {number + 1}: " + _line({k: v[-1] for k, v in figures.items()}))
    medians = {key: statistics.median(values) for key, values in figures.items()}
    report(f"median:  {_line(medians)}")
    pairs = zip(figures["prepare_data"], figures["encode_batch"], strict=True)
    ratio = statistics.median([ours / bare for ours, bare in pairs])
    report(f"prepare_data / encode_batch: {ratio:.2f} (median of rounds)")
    return {"rounds": figures, "medians": medians, "prepare_data/encode_batch": ratio}


def _write_inputs(
    request: Request, folder: pathlib.Path, report: Callable[[str], None]
) -> tuple[pathlib.Path, pathlib.Path]:
    """The tokenizer and the text as files: both sides read the same files."""
    from qkjax.data import sources
    from qkjax.data import tokenizer as tokenizer_lib

    text, characters = folder / "text.jsonl", 0
    with open(text, "w", encoding="utf-8") as file:
        for document in sources.open_source(request.source).documents():
            file.write(json.dumps({"text": document.text}) + "\n")
            characters += len(document.text)
            if characters >= request.characters:
                break
    size = tokenizer_lib.trained_size(request.tokenizer)
    if size is None:
        tokenizer = tokenizer_lib.load(request.tokenizer)
    else:
        texts = (document.text for document in sources.open_source(f"jsonl:{text}").documents())
        tokenizer = tokenizer_lib.train(texts, size)
    path = folder / tokenizer_lib.FILE_NAME
    path.write_bytes(tokenizer.content)
    cores = startup.cpu_count()
    report(f"{characters:,} characters, {tokenizer.vocab_size} tokens, {cores} cores")
    return path, text


def _prepare(
    request: Request, tokenizer: pathlib.Path, text: pathlib.Path, out: pathlib.Path
) -> float:
    """Tokens/s of the whole command, start of the processes and all; per token of the text."""
    from qkjax.data import manifest as manifest_lib

    # A sixtieth of the text, as in the study: 5M of 300M.
    validation = max(1, request.characters // 4 // 60)
    start = time.perf_counter()
    _checked(
        [
            _ROOT / "tools" / "prepare_data.py",
            f"--source=jsonl:{text}",
            f"--tokenizer={tokenizer}",
            f"--sequence_length={request.sequence_length}",
            f"--validation_tokens={validation}",
            f"--out={out}",
        ]
    )
    seconds = time.perf_counter() - start
    splits = manifest_lib.load(out).splits.values()
    return sum(split.num_tokens for split in splits) / seconds


def _run(code: str, *arguments: Any) -> float:
    return float(_checked(["-c", code, *arguments]).strip().splitlines()[-1])


def _checked(arguments: list[Any]) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    if done.returncode:
        raise errors.UsageError(f"benchmark: a part failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in figures.items())
