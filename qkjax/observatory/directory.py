"""A public model in its own directory: revision by revision, in the files of a run."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qkjax import errors, files
from qkjax.observatory import capture, loading, measure, projected, text
from qkjax.runs.directory import RunDirectory
from qkjax.trained.rank_curves import Row

_TOKENS_AT_A_TIME = 4_096  # of a batch
_EVERY_SECONDS = 10.0  # between two lines of progress
_LONGEST = 2_048  # predicted tokens of a sequence, unless asked for more


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure; None stands for the default."""

    source: loading.Source
    out: pathlib.Path
    revisions: tuple[str, ...] = ("",)  # of the hub, or folders inside the model's directory
    text: str = ""  # of `sources.KINDS`; the embedded corpus' held-out part
    tokens: int = 65_536  # predicted; whole sequences of them
    sequence_length: int | None = None  # 2,048, or the model's longest where that is less
    skip_first: bool = False  # leave every sequence's first position out of the vectors
    bos: bool | None = None  # start sequences with that token; where its tokenizer does so
    dtype: str = "float32"  # of loading.DTYPES
    trained_tokens: int | None = None  # by the model as it is published
    tokens_per_step: int | None = None  # of its training, for revisions by step
    rank_curves: bool = False  # measure the loss with projected keys too
    rank_tokens: int = 16_384  # for that, of the same text


class _Revision(NamedTuple):
    name: str
    step: int
    tokens: int | None  # trained on


class RankCurve(NamedTuple):
    """The loss with projected keys of one revision."""

    path: pathlib.Path  # of its CSV
    rows: list[Row]
    head_dim: int
    title: str


def measure_directory(request: Request, report: Callable[[str], None] = print) -> list[RankCurve]:
    """Measures every revision that `out` does not have yet.

    Args:
        report: gets lines of progress, and a summary of each revision.
    Returns:
        The rank curves, where they were asked for.
    Raises:
        UsageError: what cannot be loaded or measured, an `out` with something else in it, or
            revisions whose steps are unknown or equal.
        StorageError: the disk failed; revisions that are done stay.
    """
    revisions = _revisions(request)
    loading.require_packages(request.source)
    directory = RunDirectory(request.out)
    if directory.config.exists():
        raise errors.UsageError(
            f"--out: {directory} is a run, expected a new directory. Give another."
        )
    curves = []
    for revision in revisions:
        curves += _measure(request, revision, directory, report)
    report(str(directory))
    return curves


def _revisions(request: Request) -> list[_Revision]:
    """In ascending steps."""
    names, alone = request.revisions, len(request.revisions) == 1
    found = []
    for name in names:
        step = loading.step_of(name)
        if step is None and not alone:
            raise errors.UsageError(
                f"--revision: {name!r} names no step, expected one as in step1000, for several "
                "revisions. Measure it alone."
            )
        tokens = loading.tokens_of(name)
        if alone and request.trained_tokens is not None:
            tokens = request.trained_tokens
        elif request.tokens_per_step is not None and step is not None:
            tokens = step * request.tokens_per_step
        if tokens is None and not alone:
            raise errors.UsageError(
                f"--revision: {name!r} names no tokens, expected them for a trajectory. "
                "Give --tokens_per_step=N, of the model's training."
            )
        found.append(_Revision(name, step or 0, tokens))
    found.sort(key=lambda revision: revision.step)
    if len({revision.step for revision in found}) < len(found):
        raise errors.UsageError("--revision: a step is named twice. Name every one once.")
    if not alone and request.trained_tokens is not None:
        raise errors.UsageError(
            "--trained_tokens: of one model, found several revisions. Give --tokens_per_step."
        )
    return found


def _measure(
    request: Request,
    revision: _Revision,
    directory: RunDirectory,
    report: Callable[[str], None],
) -> list[RankCurve]:
    record = directory.read_model()
    done = [] if record is None else record["revisions"]
    is_done = any(each["step"] == revision.step for each in done)
    curve = projected.path_of(directory, revision.step)
    wants_curve = request.rank_curves and not curve.exists()
    of = f", {revision.name}" if revision.name else ""
    report(f"{request.source.name}{of}: loading the model, then the text")
    model = loading.load_model(request.source, revision.name, request.dtype)
    records = _records(request, revision, model)
    facts = _facts(request, model, records)
    if record is not None:
        _check_same(directory, record, facts)
    if is_done and not wants_curve:
        report(f"{directory}: has step {revision.step} already")
        return []
    RunDirectory.make(directory.path)
    sha256 = loading.params_sha256(model)
    with capture.Capture(model, request.source.name) as captured:
        if not is_done:
            progress = _Progress(report, records.ids)
            found = measure.one_pass(
                captured,
                _batches(records.ids),
                skip_first=request.skip_first,
                batch_done=progress.batch_done,
            )
            directory.write_evaluation(revision.step, found.spectra, found.validation)
            rows = [] if record is None else directory.read_metrics()
            rows = [row for row in rows if row["step"] != revision.step]
            rows.append({"step": revision.step, "tokens": revision.tokens, **found.metrics})
            directory.write_metrics(sorted(rows, key=lambda row: row["step"]))
            directory.write_environment(records.fingerprint)
            this = {
                "revision": revision.name,
                "step": revision.step,
                "tokens": revision.tokens,
                "params_sha256": sha256,
            }
            revisions = sorted([*done, this], key=lambda each: each["step"])
            record = {**facts, **_of_attention(captured, found.spectra), "revisions": revisions}
            directory.write_model(record)
            report(_summary(revision, found.metrics, record))
        if not wants_curve:
            return []
        length = records.ids.shape[1] - 1
        some = records.ids[: max(1, request.rank_tokens // length)]
        batches = list(_batches(some))
        rows_of_curve, about = projected.measure(captured, batches, sha256, report)
    projected.write(curve, rows_of_curve)
    assert captured.shape is not None
    title = f"Keys projected: {facts['name']}, {about}"
    return [RankCurve(curve, rows_of_curve, captured.shape.head_dim, title)]


def _records(request: Request, revision: _Revision, model: Any) -> text.Records:
    """The text in the ids of the model's tokenizer."""
    tokenizer = loading.load_tokenizer(request.source, revision.name)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    length = request.sequence_length or min(_LONGEST, longest)
    if not 1 < length <= longest:
        raise errors.UsageError(
            f"--sequence_length: {length}, expected from 2 to the model's {longest}. Give another."
        )
    bos = loading.bos_of(tokenizer)
    if request.bos is not None:
        bos = tokenizer.bos_token_id if request.bos else None
        if request.bos and bos is None:
            raise errors.UsageError(
                f"--bos: the tokenizer of {request.source.name} has no such token. Leave it out."
            )
    records = text.read(request.text, tokenizer, tokens=request.tokens, length=length, bos=bos)
    rows = model.get_input_embeddings().weight.shape[0]
    if int(records.ids.max()) >= rows:
        raise errors.UsageError(
            f"--tokenizer: its ids reach {int(records.ids.max())}, and {request.source.name} has "
            f"{rows} tokens. Give the model's own tokenizer."
        )
    return records


def _batches(ids: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, _TOKENS_AT_A_TIME // (ids.shape[1] - 1))
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _facts(request: Request, model: Any, records: text.Records) -> dict[str, Any]:
    """What model.json says of the model and of how it is measured, before any pass."""
    config = model.config.get_text_config()
    path = pathlib.Path(request.source.name)
    return {
        # A path says where a copy lies on one machine: its last part is the name.
        "name": path.absolute().name if path.exists() else request.source.name,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantised": path.name if request.source.is_gguf else None,
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "d_model": config.hidden_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "skip_first": request.skip_first,
        "text": {**records.facts, "fingerprint": records.fingerprint},
    }


def _of_attention(captured: capture.Capture, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What model.json says of the attention, as the pass found it."""
    assert captured.shape is not None
    layers = [captured.facts[layer] for layer in range(captured.num_layers)]
    qk_norm = "none"
    if "key_pre_norm_raw" in arrays:
        across = arrays.get("gamma_k", np.zeros((1, 1))).shape[-1] > captured.shape.head_dim
        qk_norm = "over all heads" if across else "per head"
    return {
        "qk_norm": qk_norm,
        "num_layers": captured.num_layers,
        "num_heads": captured.shape.heads,
        "num_kv_heads": captured.shape.kv_heads,
        "head_dim": captured.shape.head_dim,
        "layers": [facts._asdict() for facts in layers],
        "stages": sorted(
            name.removesuffix("_raw")
            for name in arrays
            if name.startswith(("key", "query", "value")) and name.endswith("_raw")
        ),
    }


def _check_same(
    directory: RunDirectory, record: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """All revisions of a directory are of one model, measured in one way."""
    ours = files.plain(facts)
    changed = [name for name in ours if record.get(name) != ours[name]]
    if changed:
        raise errors.UsageError(
            f"{directory.model}: measured with another {', '.join(changed)}, and all revisions of "
            "a directory are measured in the same way. Give another --out."
        )


def _summary(revision: _Revision, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    stages = [
        f"{stage.replace('_', '-').replace('rope', 'RoPE')} "
        f"{metrics[f'pr/key/{stage}/raw']:.2f} raw {metrics[f'pr/key/{stage}/centred']:.2f} centred"
        for stage in ("pre_norm", "pre_rope", "post_rope")
        if f"pr/key/{stage}/raw" in metrics
    ]
    return (
        f"{record['name']} {revision.name}".rstrip()
        + f": loss {metrics['val/loss']:.4f}; PR of keys, of {record['head_dim']}: "
        + ", ".join(stages)
    )


class _Progress:
    """A line now and then within a pass."""

    def __init__(self, report: Callable[[str], None], ids: np.ndarray) -> None:
        self._report = report
        self._batches = sum(1 for _ in _batches(ids))
        self._done = 0
        self._started = self._shown = time.monotonic()

    def batch_done(self, loss: float) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < _EVERY_SECONDS:
            return
        self._shown = now
        seconds = round((now - self._started) / self._done * (self._batches - self._done))
        bar = "#" * (20 * self._done // self._batches)
        self._report(
            f"[{bar:<20}] batch {self._done}/{self._batches}  loss {loss:.4f}  "
            f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        )
