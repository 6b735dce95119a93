"""Measures speed on this machine, ours against what it stands on, in one interleaved run.

  python tools/benchmark.py data [--source=docstrings] [--tokenizer=train:4096] [--rounds=3]

data: tokens/s of bare `tokenizers.encode_batch` on all cores, of prepare_data on the same text and
cores from jsonl to finished shards, and of the training loader on one core. Every round measures
each of them once; the medians and their ratios are printed, and every round's figures.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from qkjax import command_line, errors

_SOURCE = flags.DEFINE_string("source", "docstrings", "Text to encode; see prepare_data.py.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "train:4096", "The tokenizer; a trained one is trained before the measurement."
)
_CHARACTERS = flags.DEFINE_integer("characters", 40_000_000, "How much of the source to take.")
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Predicted tokens of a record.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is measured.")

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
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
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


def main(subject: str) -> None:
    subjects = {"data": _data}
    if subject not in subjects:
        raise errors.UsageError(
            f"{subject}: unknown benchmark. Known are: {', '.join(subjects)}. See --help."
        )
    if _ROUNDS.value < 1:
        raise errors.UsageError(
            f"--rounds: expected at least 1, found {_ROUNDS.value}. See --help."
        )
    subjects[subject]()


def _data() -> None:
    with tempfile.TemporaryDirectory(prefix="qkjax-benchmark-") as name:
        folder = Path(name)
        tokenizer, text = _write_inputs(folder)
        figures: dict[str, list[float]] = {"encode_batch": [], "prepare_data": [], "loader": []}
        for number in range(_ROUNDS.value):
            out = folder / f"dataset-{number}"
            figures["encode_batch"].append(_run(_BARE, tokenizer, text))
            figures["prepare_data"].append(_prepare(tokenizer, text, out))
            figures["loader"].append(_run(_LOADER, out, _BATCH_SEQUENCES, _LOADER_SECONDS))
            print(f"round {number + 1}: " + _line({k: v[-1] for k, v in figures.items()}))
        medians = {key: statistics.median(values) for key, values in figures.items()}
        print(f"median:  {_line(medians)}")
        ratios = [
            ours / bare
            for ours, bare in zip(figures["prepare_data"], figures["encode_batch"], strict=True)
        ]
        print(f"prepare_data / encode_batch: {statistics.median(ratios):.2f} (median of rounds)")


def _write_inputs(folder: Path) -> tuple[Path, Path]:
    """The tokenizer and the text as files: both sides read the very same."""
    from qkjax.data import sources
    from qkjax.data import tokenizer as tokenizer_lib

    text, characters = folder / "text.jsonl", 0
    with open(text, "w", encoding="utf-8") as file:
        for document in sources.open_source(_SOURCE.value).documents():
            file.write(json.dumps({"text": document.text}) + "\n")
            characters += len(document.text)
            if characters >= _CHARACTERS.value:
                break
    size = tokenizer_lib.trained_size(_TOKENIZER.value)
    if size is None:
        tokenizer = tokenizer_lib.load(_TOKENIZER.value)
    else:
        texts = (document.text for document in sources.open_source(f"jsonl:{text}").documents())
        tokenizer = tokenizer_lib.train(texts, size)
    path = folder / tokenizer_lib.FILE_NAME
    path.write_bytes(tokenizer.content)
    cores = len(os.sched_getaffinity(0))
    print(f"{characters:,} characters, {tokenizer.vocab_size} tokens, {cores} cores")
    return path, text


def _prepare(tokenizer: Path, text: Path, out: Path) -> float:
    """Tokens/s of the whole command, start of the processes and all; per token of the text."""
    from qkjax.data import manifest

    tool = Path(__file__).with_name("prepare_data.py")
    length = _SEQUENCE_LENGTH.value
    # A sixtieth of the text, as in the study: 5M of 300M.
    validation = max(1, _CHARACTERS.value // 4 // 60)
    start = time.perf_counter()
    _checked(
        [tool, f"--source=jsonl:{text}", f"--tokenizer={tokenizer}", f"--sequence_length={length}",
         f"--validation_tokens={validation}", f"--out={out}"]
    )  # fmt: skip
    seconds = time.perf_counter() - start
    splits = manifest.load(out).splits.values()
    return sum(split.num_tokens for split in splits) / seconds


def _run(code: str, *arguments: Any) -> float:
    return float(_checked(["-c", code, *arguments]).strip().splitlines()[-1])


def _checked(arguments: list[Any]) -> str:
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise errors.UsageError(f"benchmark: a part failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in figures.items())


if __name__ == "__main__":
    command_line.run(main, positionals=["SUBJECT"])
