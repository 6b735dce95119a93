"""What the evaluations of runs measured: read from run directories, and compared.

A public model that `qkjax measure` has measured is read as a run is: it stands beside runs.
"""

import csv
import io
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkjax import config as config_lib
from qkjax import errors
from qkjax.report.quantities import Quantity
from qkjax.runs.directory import RunDirectory, flatten

_MOST_SETTINGS = 8  # named of a run that differs from the first one
_CLIPS = ("train/max_logit", "train/clipped_heads")


class Evaluation(NamedTuple):
    """One pass over the validation data."""

    step: int
    tokens: int  # trained on before it; 0 too where nobody says how many (RunSpectra.ages_known)
    arrays: dict[str, np.ndarray]  # of docs/run_directory.md
    loss: float | None  # val/loss, nats


class RunSpectra(NamedTuple):
    """What a run is and what its evaluations measured, in ascending steps; at least one."""

    label: str  # end of the path, as short as tells the runs of a figure apart
    workdir: pathlib.Path
    arm: str  # of a public model its class
    seed: int | None  # None: a public model
    qk_norm: str
    head_dim: int
    sequence_length: int
    dataset_fingerprint: str
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]  # what was left out, for people
    clips: np.ndarray  # [steps, 3] of QK-Clip: tokens, largest logit, heads clipped; else [0, 3]
    settings: Mapping[str, object] = {}  # by dotted name, what a config sets; {}: a public model
    ages_known: bool = True  # False: a public model, and nobody says how long it was trained

    @property
    def is_model(self) -> bool:
        """Whether others have trained it."""
        return self.seed is None

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the evaluations."""
        return tuple(evaluation.step for evaluation in self.evaluations)

    def at(self, step: int) -> Evaluation:
        """The evaluation after `step` updates.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        for evaluation in self.evaluations:
            if evaluation.step == step:
                return evaluation
        raise errors.UsageError(
            f"--step: {step} was not evaluated in {self.workdir}. "
            f"Choose one of {', '.join(map(str, self.steps))}."
        )

    def series(self, *arrays: str) -> list[Evaluation]:
        """The evaluations that recorded all of `arrays`."""
        return [e for e in self.evaluations if all(name in e.arrays for name in arrays)]


def load_run(workdir: str | pathlib.Path, label: str = "") -> RunSpectra:
    """Reads config.json, environment.json, metrics.jsonl and spectra/step_*.npz of a run.

    Args:
        label: the run's name in figures; the directory's name unless given.
    Raises:
        UsageError: not a run directory, no evaluation yet, or a damaged file.
        StorageError: the disk failed.
    """
    directory = RunDirectory(workdir)
    model = directory.read_model()
    config = directory.read_config() if model is None and directory.path.is_dir() else None
    if model is None and config is None:
        raise errors.UsageError(
            f"{directory}: neither a run nor a measured model, expected a config.json or a "
            "model.json in it. Give a --workdir of `qkjax train`, or an --out of `qkjax measure`."
        )
    directory.check_files()
    rows = directory.read_metrics()
    tokens = {row["step"]: row["tokens"] or 0 for row in rows if "tokens" in row}
    losses = {row["step"]: row.get("val/loss") for row in rows}
    evaluations, notes = [], []
    for step in directory.spectra_steps():
        if step not in tokens:  # the run trains, or was killed, between the two files
            file = directory.spectra(step)
            notes.append(f"{file}: left out, metrics.jsonl has no row of step {step}")
            continue
        evaluations.append(
            Evaluation(step, tokens[step], directory.read_spectra(step), losses[step])
        )
    if not evaluations:
        raise errors.UsageError(
            f"{directory.path / 'spectra'}: no evaluation in it, expected step_*.npz. "
            "Wait for the run's first evaluation."
        )
    facts: dict[str, Any] = {
        "label": label or directory.path.absolute().name,
        "workdir": directory.path,
        "dataset_fingerprint": directory.need_environment()["dataset_fingerprint"],
        "evaluations": tuple(sorted(evaluations, key=lambda evaluation: evaluation.step)),
        "clips": np.array(
            [
                (row["tokens"], *(math.nan if row[name] is None else row[name] for name in _CLIPS))
                for row in rows
                if all(name in row for name in ("tokens", *_CLIPS))
            ],
            np.float64,
        ).reshape(-1, 3),
    }
    if config is not None:
        return RunSpectra(
            arm=config.arm,
            seed=config.seed,
            qk_norm=config.model.qk_norm,
            head_dim=config.model.head_dim,
            sequence_length=config.model.sequence_length,
            settings={
                name: value
                for name, value in flatten(config.to_dict()).items()
                if name in config_lib.OPTIONS and name not in config_lib.FREE_FIELDS
            },
            notes=tuple(notes),
            **facts,
        )
    assert model is not None
    ages_known = all(row.get("tokens") is not None for row in rows)
    if not ages_known:
        notes.append(
            f"{directory.model}: names no training tokens, so no figure over training tokens is "
            "drawn"
        )
    return RunSpectra(
        arm=model["class"],
        seed=None,
        qk_norm=model["qk_norm"],
        head_dim=model["head_dim"],
        sequence_length=model["text"]["sequence_length"],
        notes=tuple(notes),
        ages_known=ages_known,
        **facts,
    )


def load_runs(workdirs: Sequence[str | pathlib.Path]) -> list[RunSpectra]:
    """The runs in their order, labelled by the shortest path ends that tell them apart.

    Raises:
        UsageError: as `load_run`; or one run is given twice.
    """
    parts = [pathlib.Path(workdir).resolve().parts for workdir in workdirs]
    for i, run in enumerate(parts):
        if run in parts[:i]:
            raise errors.UsageError(f"{workdirs[i]}: given twice. Name every run once.")
    length = 1
    while len({run[-length:] for run in parts}) < len(parts):
        length += 1
    labels = ["/".join(run[-length:]) for run in parts]
    return [load_run(workdir, label) for workdir, label in zip(workdirs, labels, strict=True)]


# --------------------------------------------------------------------------------------------
# Comparing.


class Compared(NamedTuple):
    """One run in a comparison."""

    run: RunSpectra
    evaluation: Evaluation
    values: np.ndarray  # [layers, heads]
    difference: np.ndarray  # to the first run


def compare(
    runs: Sequence[RunSpectra], quantity: Quantity, step: int | None = None
) -> list[Compared]:
    """Runs after equally many training tokens, with their differences to the first one.

    A public model has its own text, age and shape: with one among them, each stands with its last
    evaluation, and differences are NaN, which is no number.

    Args:
        step: an evaluation of the first run; None is the last one that every run has.
    Raises:
        UsageError: the runs measured other validation data or another architecture, or one lacks
            the evaluation or the quantity.
    """
    first = runs[0]
    if any(run.is_model for run in runs):
        return [_beside(run, quantity, step if run is first else None) for run in runs]
    for run in runs[1:]:
        if run.dataset_fingerprint != first.dataset_fingerprint:
            raise errors.UsageError(
                f"{run.workdir}: dataset {run.dataset_fingerprint}, "
                f"but {first.workdir} has {first.dataset_fingerprint}. "
                "Compare runs on one dataset: spectra depend on the validation tokens."
            )
    compared: list[Compared] = []
    for run, evaluation in zip(runs, _evaluations(runs, step), strict=True):
        values = _recorded(run, evaluation, quantity)
        base = compared[0] if compared else Compared(run, evaluation, values, values)
        _check_comparable(base, run, evaluation, quantity.array)
        compared.append(Compared(run, evaluation, values, values - base.values))
    return compared


def _recorded(run: RunSpectra, evaluation: Evaluation, quantity: Quantity) -> np.ndarray:
    values = quantity.values(evaluation.arrays)
    if values is None:
        raise errors.UsageError(
            f"{run.workdir}: step {evaluation.step} has not recorded {quantity.array}. "
            f"Recorded: {', '.join(sorted(evaluation.arrays))}."
        )
    return values


def _beside(run: RunSpectra, quantity: Quantity, step: int | None) -> Compared:
    evaluation = run.evaluations[-1] if step is None else run.at(step)
    values = _recorded(run, evaluation, quantity)
    return Compared(run, evaluation, values, np.full_like(values, np.nan))


def _check_comparable(base: Compared, run: RunSpectra, evaluation: Evaluation, array: str) -> None:
    shape, expected = evaluation.arrays[array].shape, base.evaluation.arrays[array].shape
    if shape != expected:
        raise errors.UsageError(
            f"{run.workdir}: {array} has shape {shape}, but {expected} in {base.run.workdir}. "
            "Compare runs of one architecture."
        )
    tokens, expected_tokens = _num_tokens(evaluation), _num_tokens(base.evaluation)
    if tokens != expected_tokens:
        raise errors.UsageError(
            f"{run.workdir}: measured on {tokens} validation tokens, "
            f"but {base.run.workdir} on {expected_tokens}. Compare runs with one eval.tokens."
        )


def _evaluations(runs: Sequence[RunSpectra], step: int | None) -> list[Evaluation]:
    """One evaluation of each run, all after equally many training tokens."""
    by_tokens = [{e.tokens: e for e in run.evaluations} for run in runs]
    if step is not None:
        tokens = runs[0].at(step).tokens
    elif common := set(by_tokens[0]).intersection(*by_tokens):
        tokens = max(common)
    else:
        tokens = max(by_tokens[0])
    for run, evaluations in zip(runs, by_tokens, strict=True):
        if tokens not in evaluations:
            raise errors.UsageError(
                f"{run.workdir}: no evaluation after {tokens} tokens, which {runs[0].workdir} "
                f"has. It has {', '.join(map(str, evaluations))}. Choose another --step."
            )
    return [evaluations[tokens] for evaluations in by_tokens]


def _num_tokens(evaluation: Evaluation) -> int | None:
    array = evaluation.arrays.get("num_tokens")
    return None if array is None else int(array)


def comparison_csv(compared: Sequence[Compared]) -> str:
    """The comparison, one line per run, layer and head; an empty cell is undefined (NaN)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("run", "arm", "seed", "step", "tokens", "layer", "head", "value", "difference")
    writer.writerow(fields)
    for run, evaluation, values, difference in compared:
        for layer, head in np.ndindex(values.shape):
            cells = (_cell(float(values[layer, head])), _cell(float(difference[layer, head])))
            tokens = evaluation.tokens if run.ages_known else ""
            run_is = (run.label, run.arm, run.seed, evaluation.step, tokens)
            writer.writerow((*run_is, layer, head, *cells))
    return text.getvalue()


def comparison_lines(compared: Sequence[Compared], quantity: Quantity) -> Iterator[str]:
    """The comparison for people: a line a run, its mean over heads and layers, and its settings.

    Named are the settings in which a run differs from the first one; the seed has a column.
    """
    first = compared[0].run
    rows = [("run", "arm", "seed", "step", "tokens", "val/loss", quantity.name)]
    for run, evaluation, values, _ in compared:
        seed = "-" if run.seed is None else str(run.seed)
        tokens = f"{evaluation.tokens:,}" if run.ages_known else "-"
        loss = "-" if evaluation.loss is None else f"{evaluation.loss:.4f}"
        mean = f"{float(values.mean()):.4g}"
        rows.append((run.label, run.arm, seed, str(evaluation.step), tokens, loss, mean))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, arm, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
        yield "  ".join([f"{name:<{widths[0]}}", f"{arm:<{widths[1]}}", *numbers])
    for run in [each.run for each in compared[1:]]:
        others = [
            f"{name} {value}, in {first.label} {first.settings[name]}"
            for name, value in run.settings.items()
            if name != "seed" and first.settings.get(name, value) != value
        ]
        if others:
            left = len(others) - _MOST_SETTINGS
            yield f"{run.label} has {'; '.join(others[:_MOST_SETTINGS])}" + (
                f"; and {left} more" if left > 0 else ""
            )


def _cell(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else ""
