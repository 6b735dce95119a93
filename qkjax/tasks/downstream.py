"""A model's answers to HellaSwag and LAMBADA: scored by lm-eval, kept item by item.

The numbers of the JSON file follow from the items beside it. `--backend=hf` is lm-eval's own model
of an exported directory; `--backend=jax` scores the run's parameters without torch. Both start
every prompt as the model's documents started in training.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkjax import errors, files
from qkjax.export import directory
from qkjax.tasks import benchmarks, scores, stock_model
from qkjax.tasks.benchmarks import Benchmark, Files
from qkjax.trained import trained_run

BACKENDS = ("hf", "jax")
_RUN_FIELDS = (
    "arm",
    "seed",
    "step",
    "params_sha256",
    "dataset_fingerprint",
    "scale",
    "recipe",
)
_PACKAGES = {
    "hf": ("qkjax", "lm_eval", "datasets", "tokenizers", "transformers", "torch"),
    "jax": ("qkjax", "lm_eval", "datasets", "tokenizers", "jax", "jaxlib"),
}
_ITEMS_SUFFIX = ".items.jsonl"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to score; one of model and workdir is given. None stands for the default."""

    tasks: tuple[str, ...]  # names of benchmarks.BENCHMARKS
    out: pathlib.Path  # the JSON file; the items come to lie beside it
    model: pathlib.Path | None = None  # an exported directory
    workdir: pathlib.Path | None = None  # a run
    step: int | None = None  # of the run's checkpoint; the latest
    backend: str | None = None  # one of BACKENDS; jax for a run, hf for a directory
    data_dir: pathlib.Path | None = None  # the tasks' files; from the hub
    dataset_dir: str | None = None  # where the run's dataset lies now; where the run found it
    limit: int | None = None  # the first items only; all


def run(request: Request, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Scores the tasks and writes `out` and its items; with files of tasks, without network.

    Args:
        report: gets a line for every task.
    Returns:
        What the JSON file holds.
    Raises:
        UsageError: a wrong request, files of another shape, a package that is missing, a model
            that does not load or is not finite.
        StorageError: the disk failed; no JSON file has appeared.
    """
    chosen, backend = _check(request)
    data_dir = request.data_dir
    if data_dir:
        benchmarks.stay_offline()  # before the packages are imported
    benchmarks.require_lm_eval()
    if backend == "hf":
        stock_model.require_packages()
    given = {one.name: benchmarks.read(one, data_dir) if data_dir else None for one in chosen}
    started = time.monotonic()
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.out.parent, prefix=".downstream-") as scratch:
        tasks = {
            one.name: benchmarks.load(one, given[one.name], pathlib.Path(scratch)) for one in chosen
        }
        subject = _open(request, backend, pathlib.Path(scratch))
        results, items = {}, []
        for one in chosen:
            result, of_task = _evaluate(
                one, tasks[one.name], given[one.name], subject, request.limit
            )
            results[one.name] = result
            items += of_task
            report(scores.summary(result, is_sample=request.limit is not None))
    lines = "".join(json.dumps(files.plain(item)) + "\n" for item in items)
    record = {
        "format_version": 1,
        "backend": backend,
        "sample": request.limit is not None,
        "limit": request.limit,
        "run": {field: subject.record.get(field) for field in _RUN_FIELDS},
        "weights": subject.record.get("dtype"),
        "tasks": results,
        "bos": subject.bos,
        "tokens_computed": sum(result["tokens_computed"] for result in results.values()),
        "items_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "versions": _versions(backend),
        "wall_seconds": time.monotonic() - started,
    }
    files.replace(request.out.with_suffix(_ITEMS_SUFFIX), lines.encode())
    files.write_sealed(request.out, record)  # last: the mark of a whole result
    report(str(request.out))
    return record


def _check(request: Request) -> tuple[list[Benchmark], str]:
    if (request.model is None) == (request.workdir is None):
        raise errors.UsageError(
            "--model, --workdir: expected one of them. Name an exported directory, "
            "--model=exports/NAME, or a run, --workdir=runs/NAME."
        )
    if request.model and request.backend == "jax":
        raise errors.UsageError(
            "--backend: jax scores a run directory. Give --workdir instead of --model."
        )
    if request.model and (request.step is not None or request.dataset_dir):
        raise errors.UsageError(
            "--step, --dataset_dir: --model is one checkpoint, with its tokenizer. "
            "Give them with --workdir."
        )
    if request.limit is not None and request.limit < 1:
        raise errors.UsageError(f"--limit: {request.limit}, expected 1 or more. Give another.")
    if request.out.suffix != ".json":
        raise errors.UsageError(f"--out: {request.out}, expected a name that ends in .json.")
    if request.out.exists():
        raise errors.UsageError(
            f"--out: {request.out} already exists, and no result is overwritten. "
            "Give another file, or move this one away."
        )
    return benchmarks.named(request.tasks), request.backend or ("hf" if request.model else "jax")


# --------------------------------------------------------------------------------------------
# The model.


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model of lm-eval, and what is written down about it."""

    lm: Any
    counter: Any  # has `tokens_computed`
    record: Mapping[str, Any]  # the run's identity, and the dtype of the weights
    bos: Mapping[str, Any]


def _open(request: Request, backend: str, scratch: pathlib.Path) -> _Subject:
    if request.workdir is None:
        assert request.model is not None
        return _open_stock(request.model)
    run = trained_run.open_run(
        request.workdir,
        step=request.step,
        data_dir=request.dataset_dir,
        data_flag="--dataset_dir",
    )
    if backend == "hf":
        directory.write(run, scratch / "model")
        return _open_stock(scratch / "model")
    from qkjax.tasks import scorer

    adds_bos = run.dataset.manifest.end_of_text
    lm = scorer.Scorer(run.params, run.config.model, run.tokenizer, add_bos=adds_bos)
    record = {**run.identity, "dtype": "float32"}
    return _Subject(lm, lm, record, _bos(adds_bos, run.tokenizer.eos_id, run.tokenizer.eos_token))


def _open_stock(path: pathlib.Path) -> _Subject:
    stock = stock_model.StockModel(path)
    tokenizer = stock.lm.tokenizer
    known = bool(stock.record)
    bos = _bos(stock.adds_bos, tokenizer.bos_token_id, tokenizer.bos_token, known=known)
    return _Subject(stock.lm, stock, stock.record, bos)


def _bos(
    added: bool, token_id: int | None, token: str | None, *, known: bool = True
) -> dict[str, Any]:
    """Whether every prompt starts with a token, which one, and why."""
    if not known:
        why = "no qkjax.json in the directory: its tokenizer decides"
    elif added:
        why = "documents in training came after the end-of-text token"
    else:
        why = "the training data has no end-of-text tokens"
    return {"added": added, "token": token, "token_id": token_id, "why": why}


# --------------------------------------------------------------------------------------------
# Scores.


def _evaluate(
    benchmark: Benchmark, task: Any, given: Files | None, subject: _Subject, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the task's entry of the JSON file, its items)."""
    import lm_eval.evaluator

    before, started = subject.counter.tokens_computed, time.monotonic()
    requests = _Requests(subject.lm)
    try:
        found = lm_eval.evaluator.evaluate(
            subject.lm,
            {"tasks": {benchmark.title: task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,  # errors are computed here, from the items
        )
    finally:
        requests.close()
    assert found is not None and found["samples"] is not None
    items = [scores.item(benchmark, sample) for sample in found["samples"][benchmark.title]]
    items.sort(key=lambda item: item["index"])
    scores.check_finite(items)
    result = {
        "name": _name(benchmark, given),
        "num_fewshot": benchmark.num_fewshot,
        "n": len(items),
        "metrics": scores.metrics(benchmark.name, items),
        **_byte_exact(benchmark, given, items),
        "truncated": requests.truncated,
        "tokens_computed": subject.counter.tokens_computed - before,
        "tokens_unshared": requests.tokens,
        "data_sha256": dict(given.sha256) if given else _hub_digests(task),
        "wall_seconds": time.monotonic() - started,
    }
    return result, items


def _byte_exact(
    benchmark: Benchmark, given: Files | None, items: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The metrics of the items that are the original to the byte, where the files say which."""
    exact = [item for item in items if given and given.is_exact and given.is_exact[item["index"]]]
    if not exact:
        return {}
    return {"byte_exact": {"n": len(exact), "metrics": scores.metrics(benchmark.name, exact)}}


class _Requests:
    """Observes what lm-eval asks a model, whichever it is.

    Attributes:
        truncated: requests whose context lost its beginning.
        tokens: positions to compute where no request shares anything with another.
    """

    def __init__(self, lm: Any) -> None:
        self._lm, self.truncated, self.tokens = lm, 0, 0
        self._score = lm._loglikelihood_tokens
        lm._loglikelihood_tokens = self._look

    def _look(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        room = self._lm.max_length
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > room:
            raise errors.UsageError(
                f"model.sequence_length: {room}, and an answer has {longest} tokens. "
                "Score a model with a longer context."
            )
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        self.truncated += sum(length > room for length in lengths)
        self.tokens += sum(min(length, room) for length in lengths)
        return self._score(requests, **kwargs)

    def close(self) -> None:
        """Leaves the model as it was."""
        del self._lm._loglikelihood_tokens


def _name(benchmark: Benchmark, given: Files | None) -> str:
    """What the score is called: rebuilt items and fixed shots are not the original."""
    notes = []
    if given and given.is_exact:
        notes.append("reconstructed")
    if given and benchmark.num_fewshot:
        notes.append(f"fixed {benchmark.num_fewshot} shots")
    return benchmark.title + (f" ({', '.join(notes)})" if notes else "")


def _hub_digests(task: Any) -> dict[str, str]:
    """A digest of the rows of every split that the hub gave."""
    digests = {}
    for split, rows in task.dataset.items():
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        digests[f"hf:{task.config.dataset_path}/{split}"] = digest.hexdigest()
    return digests


def _versions(backend: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in _PACKAGES[backend]}
