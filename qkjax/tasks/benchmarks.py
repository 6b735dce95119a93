"""HellaSwag and LAMBADA as tasks of lm-eval: its own, with data from the hub or from files.

Files are checked here, row by row, before anything heavy is loaded. HellaSwag from files takes the
first 10 rows of the training file as its shots, the same for every item; from the hub it draws
them for every item with lm-eval's seed, as published numbers do.
"""

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkjax import errors, files

_FEWSHOT_SEED = 1234  # lm-eval's default
_ORIGIN_FILE, _EXACT_FIELD = "hellaswag_val.origin.json", "exact_vs_lm_eval"
_BRACKETS = re.compile(r"\[.*?\]")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task: where lm-eval has it, how it is prompted, and what its files hold."""

    name: str  # as --tasks has it
    title: str  # as lm-eval calls it
    stock: str  # lm-eval's configuration, below its folder of tasks
    num_fewshot: int
    splits: Mapping[str, str]  # split -> the file's name, a pattern; the first one is scored
    overrides: Mapping[str, Any]  # of the configuration, for files
    row: Callable[[Mapping[str, Any]], dict[str, Any]]  # a row of a file; ValueError

    @property
    def scored_split(self) -> str:
        """The split that the questions come from."""
        return next(iter(self.splits))


def _hellaswag_row(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = _texts(row, "activity_label", "ctx_a", "ctx_b")
    endings, label = row.get("endings"), row.get("label")
    if not (isinstance(endings, list) and [type(ending) for ending in endings] == [str] * 4):
        raise ValueError(f"endings is {_short(endings)}, expected a list of 4 texts")
    for ending in endings:
        # As lm-eval edits them: what is in brackets goes, but for a title inside a text.
        if not _BRACKETS.sub("", ending.strip().replace(" [title]", ". ")).strip():
            raise ValueError(f"endings: {_short(ending)} has no words to score")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"label is {_short(label)}, expected 0 to 3")
    return {**texts, "endings": endings, "label": str(label)}


def _lambada_row(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = _texts(row, "text")
    text = texts["text"]
    # The last word, which is scored, is what follows the last space.
    if text != text.strip() or " " not in text:
        raise ValueError(
            f"text is {_short(text)}, expected several words without white space around them"
        )
    return texts


def _texts(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is {_short(row.get(name))}, expected a text")
    return {name: row[name] for name in names}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="hellaswag",
            title="hellaswag",
            stock="hellaswag/hellaswag.yaml",
            num_fewshot=10,
            splits={"validation": "hellaswag_val.*jsonl", "train": "hellaswag_train*.jsonl"},
            overrides={"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}},
            row=_hellaswag_row,
        ),
        Benchmark(
            name="lambada",
            title="lambada_openai",
            stock="lambada/lambada_openai.yaml",
            num_fewshot=0,
            splits={"test": "lambada_test.*jsonl"},
            overrides={"dataset_name": None},
            row=_lambada_row,
        ),
    )
}


def named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, each once.

    Raises:
        UsageError: a name is unknown, or none is given.
    """
    known = ", ".join(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            raise errors.UsageError(f"--tasks: {name!r} is unknown. Known are {known}.")
    if not names:
        raise errors.UsageError(f"--tasks: none given. Name some of {known}.")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


# --------------------------------------------------------------------------------------------
# Files.


@dataclasses.dataclass(frozen=True)
class Files:
    """A benchmark's data of a --data_dir, checked."""

    rows: Mapping[str, list[dict[str, Any]]]  # by split
    sha256: Mapping[str, str]  # by file name
    is_exact: list[bool] | None  # of every scored row: byte-exact; None: nobody said


def read(benchmark: Benchmark, data_dir: pathlib.Path) -> Files:
    """The files of `data_dir/NAME`, every row checked.

    Raises:
        UsageError: a file is missing, or several may be meant; a row of another shape; fewer
            training rows than shots.
    """
    folder = data_dir / benchmark.name
    rows, digests = {}, {}
    for split, pattern in benchmark.splits.items():
        path = _only_file(folder, pattern)
        rows[split] = _read_rows(path, benchmark)
        digests[path.name] = files.sha256(path)
        needed = 1 if split == benchmark.scored_split else benchmark.num_fewshot
        if len(rows[split]) < needed:
            raise errors.UsageError(
                f"{path}: {len(rows[split])} rows, expected at least {needed}. "
                "Download the whole file."
            )
    is_exact = None
    if benchmark.name == "hellaswag" and (folder / _ORIGIN_FILE).is_file():
        is_exact = _read_exactness(folder / _ORIGIN_FILE, len(rows[benchmark.scored_split]))
        digests[_ORIGIN_FILE] = files.sha256(folder / _ORIGIN_FILE)
    return Files(rows, digests, is_exact)


def _only_file(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = fnmatch.filter(there, pattern)
    if len(found) != 1:
        what = f"{', '.join(found)} all match" if found else "no file matches"
        raise errors.UsageError(
            f"{folder}: {what} {pattern}, expected one. "
            "Name the files of --data_dir as docs/evaluation.md says."
        )
    return folder / found[0]


def _read_rows(path: pathlib.Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError("not a JSON object")
                    rows.append(benchmark.row(value))
                except (ValueError, RecursionError) as error:
                    raise errors.UsageError(
                        f"{path}: line {number}: {error}. "
                        f"Give the rows of {benchmark.title} as JSON Lines."
                    ) from error
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"{path}: not UTF-8 ({error}). Download the original.") from error
    return rows


def _read_exactness(path: pathlib.Path, num_rows: int) -> list[bool]:
    fix = "Download the original again, or remove it."
    record = files.read_object(path, fix) or {}
    files.need(path, "", record, (_EXACT_FIELD,), fix)
    found = record[_EXACT_FIELD]
    if not isinstance(found, list) or [type(x) for x in found] != [bool] * num_rows:
        raise errors.UsageError(
            f"{path}: {_EXACT_FIELD} is not a list of {num_rows} truth values, one for every row. "
            "Download the file that belongs to the rows, or remove it."
        )
    return found


# --------------------------------------------------------------------------------------------
# lm-eval's tasks.


def require_lm_eval() -> None:
    """Checks that lm-eval is installed.

    Raises:
        UsageError: it is not; names the command that installs it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise errors.UsageError(
            f"{error.name}: not installed, and tasks are scored with lm-eval. "
            "Run pip install -e '.[eval]', or pip install lm-eval if you do not want torch."
        ) from None


def stay_offline() -> None:
    """Forbids the libraries of the hub any request; to be called before they are imported."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))


def load(benchmark: Benchmark, files: Files | None, scratch: pathlib.Path) -> Any:
    """lm-eval's task, ready to be evaluated.

    Args:
        files: its data; None: lm-eval takes it from the hub.
        scratch: an empty directory that stays as long as the task is used.
    Raises:
        UsageError: the hub does not give the data.
    """
    import datasets
    import lm_eval.tasks

    stock = pathlib.Path(lm_eval.tasks.__file__).parent / benchmark.stock
    config = {"include": str(stock), "num_fewshot": benchmark.num_fewshot}
    if files:
        paths = {split: scratch / f"{benchmark.name}-{split}.jsonl" for split in files.rows}
        for split, path in paths.items():  # lm-eval's loader wants the same columns everywhere
            path.write_text("".join(json.dumps(row) + "\n" for row in files.rows[split]))
        data_files = {split: str(path) for split, path in paths.items()}
        config |= {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data_files, "cache_dir": str(scratch / "cache")},
            **benchmark.overrides,
        }
    path = scratch / f"{benchmark.name}.yaml"
    path.write_text(json.dumps({**config, "task": benchmark.title}))  # JSON is YAML
    datasets.disable_progress_bars()
    try:
        found = lm_eval.tasks.TaskManager(include_defaults=False).load([str(path)])
    except Exception as error:  # the libraries raise many, offline or for a bad reply
        if files:
            raise
        raise errors.UsageError(
            f"--tasks: the hub does not give {benchmark.title} ({errors.one_line(error)}). "
            "Give its files as --data_dir=DIR, see docs/evaluation.md."
        ) from error
    (task,) = found["tasks"].values()
    task.set_fewshot_seed(_FEWSHOT_SEED)
    return task
