"""One finished run as its numbers: what statistics, verdicts, figures and the sweep use of it."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkjax import config as config_lib
from qkjax import errors
from qkjax.measures import ranks
from qkjax.runs.directory import FINAL, Evaluation, RunDirectory, final_name

LOSS, PR = "val/loss", "pr/key/post_rope/raw"
_PR_ARRAY = "key_post_rope_raw"
# Relative: rounding of float32 sums; of singular values as float32, and as packed float16.
_LOSS_TOLERANCE, _PR_TOLERANCE, _PACKED_TOLERANCE = 2e-6, 2e-5, 2e-3
_ELSEWHERE = "Restore it from a copy, or run this run again elsewhere."


class Probe(NamedTuple):
    """One evaluation of a run."""

    step: int  # updates done
    tokens: int  # trained on
    metrics: dict[str, float | None]  # names of docs/metrics.md; None: not finite


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run. A diverged one is finished: divergence is an outcome."""

    arm: str
    seed: int
    workdir: pathlib.Path
    config: config_lib.Config
    dataset_fingerprint: str
    environment: dict[str, Any]  # environment.json
    summary: dict[str, Any]  # summary.json
    rows: tuple[dict[str, Any], ...]  # metrics.jsonl, ascending steps
    probes: tuple[Probe, ...]  # its evaluations, ascending; at least one
    sequence_losses: np.ndarray  # float64 [sequences], nat per token, of the reported pass
    functional_rank: int | None = None  # of a study's: fewest directions within 0.01 nat

    @property
    def diverged(self) -> bool:
        """Whether a step was not finite."""
        return bool(self.summary["diverged"])

    @property
    def has_final_pass(self) -> bool:
        """Whether the numbers reported are those of the pass after the last step."""
        return final_name(LOSS) in self.summary

    def value(self, metric: str) -> float:
        """The number that the study reports: of the final pass where there is one, else the last.

        Returns:
            NaN where the run never measured it, and of a diverged run, which has no end:
            divergence is an outcome, and no number stands for it (docs/statistics.md).
        """
        if self.diverged:
            return math.nan
        for name in (final_name(metric), metric):
            if name in self.summary:
                found = self.summary[name]
                return math.nan if found is None else float(found)
        return math.nan

    def at_step(self, metric: str, step: int) -> float:
        """The metric as the evaluation after `step` updates found it; NaN where there is none."""
        for probe in self.probes:
            if probe.step == step:
                found = probe.metrics.get(metric)
                return math.nan if found is None else found
        return math.nan

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(tokens, value) of every evaluation that measured the metric and found it finite."""
        found = [(probe.tokens, probe.metrics.get(metric)) for probe in self.probes]
        return [(tokens, value) for tokens, value in found if value is not None]

    def half_losses(self) -> tuple[float, float]:
        """Validation loss on the first and on the second half of the sequences, nat per token.

        Learning rates are chosen on the first half, so the second one is untouched by the choice.
        """
        middle = len(self.sequence_losses) // 2
        return (
            float(self.sequence_losses[:middle].mean()),
            float(self.sequence_losses[middle:].mean()),
        )


def load_run(workdir: str | pathlib.Path) -> RunResult | str:
    """One run directory; why it has no result yet, as text, where it is not finished.

    Raises:
        UsageError: a damaged file, or files that contradict each other.
        StorageError: the disk failed.
    """
    directory = RunDirectory(workdir)
    config = directory.read_config() if directory.path.is_dir() else None
    if config is None:
        return "not started"
    summary = directory.read_summary()
    if summary is None:
        return _progress(directory, config.train.num_steps)
    rows = directory.read_metrics()
    if not rows or rows[-1]["step"] < summary["step"]:
        raise errors.UsageError(
            f"{directory.metrics}: ends at step {rows[-1]['step'] if rows else None}, but "
            f"summary.json says {summary['step']}. {_ELSEWHERE}"
        )
    if rows[-1]["step"] - rows[0]["step"] != len(rows) - 1 or rows[0]["step"] != 0:
        raise errors.UsageError(
            f"{directory.metrics}: holds {len(rows):,} rows up to step {rows[-1]['step']:,}, "
            f"expected one of every step from 0. {_ELSEWHERE}"
        )
    if any(type(row.get("tokens")) is not int for row in rows):
        raise errors.UsageError(
            f"{directory.metrics}: a row without tokens, expected their count in every row. "
            f"{_ELSEWHERE}"
        )
    probes = tuple(_probe(row) for row in rows if LOSS in row)
    if not probes:
        raise errors.UsageError(
            f"{directory.metrics}: no evaluation in it, expected {LOSS}. Restore it from a copy."
        )
    environment = directory.need_environment()
    has_final = final_name(LOSS) in summary and directory.validation(FINAL).exists()
    _check_numbers(directory, summary, rows, probes)
    losses = directory.read_validation(FINAL if has_final else probes[-1].step)
    directory.check_files()  # last: what is known above has a better message
    return RunResult(
        arm=config.arm,
        seed=config.seed,
        workdir=directory.path,
        config=config,
        dataset_fingerprint=environment["dataset_fingerprint"],
        environment=environment,
        summary=summary,
        rows=tuple(rows),
        probes=probes,
        sequence_losses=losses.per_token,
    )


def _check_numbers(
    directory: RunDirectory,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    probes: Sequence[Probe],
) -> None:
    """Recomputes what the report uses: loss and PR of every evaluation from its arrays.

    Raises:
        UsageError: a number of summary.json or metrics.jsonl is not that of the arrays, or the two
            files disagree; names the file, both values and where the true one stands.
        StorageError: the disk failed.
    """
    latest: dict[str, Any] = {}
    for row in rows:
        latest.update(row)
    for name, value in summary.items():
        if "/" in name and name in latest and value != latest[name]:
            raise _contradiction(directory.summary, name, value, directory.metrics, latest[name])
    for probe in probes:
        place = f"{directory.metrics}, step {probe.step}"
        _check_evaluation(directory, probe.step, place, probe.metrics)
    of_final = {
        name: summary[final_name(name)] for name in (LOSS, PR) if final_name(name) in summary
    }
    if of_final:
        _check_evaluation(directory, FINAL, str(directory.summary), of_final, final_name)


def _check_evaluation(
    directory: RunDirectory,
    evaluation: Evaluation,
    place: str,
    metrics: Mapping[str, float | None],
    name_of: Callable[[str], str] = str,
) -> None:
    if LOSS in metrics and directory.validation(evaluation).exists():
        losses = directory.read_validation(evaluation)
        true = float(losses.loss_sum.sum() / losses.counts.sum())
        if not _alike(metrics[LOSS], true, _LOSS_TOLERANCE):
            raise _contradiction(
                place, name_of(LOSS), metrics[LOSS], directory.validation(evaluation), true
            )
    if PR in metrics and directory.spectra(evaluation).exists():
        sigma = directory.read_spectra(evaluation).get(_PR_ARRAY)
        if sigma is not None:
            # Packed archives hold float16, where that costs at most 2^-10 of a value.
            tolerance = _PACKED_TOLERANCE if sigma.dtype == np.float16 else _PR_TOLERANCE
            with np.errstate(invalid="ignore"):
                true = float(ranks.participation_ratio(sigma.astype(np.float64)).mean())
            if not _alike(metrics[PR], true, tolerance):
                raise _contradiction(
                    place, name_of(PR), metrics[PR], directory.spectra(evaluation), true
                )


def _alike(written: float | None, true: float, tolerance: float) -> bool:
    """Equal but for rounding; a number that is not finite is written as null."""
    if written is None:
        return not math.isfinite(true)
    return abs(written - true) <= tolerance * abs(true)


def _contradiction(
    place: object, name: str, written: object, other: object, true: object
) -> errors.UsageError:
    return errors.UsageError(
        f"{place}: {name} is {written}, but {other} gives {true}. "
        "Restore both from one copy of the run."
    )


def newest_input(workdir: pathlib.Path) -> int:
    """Modification time, in ns, of the newest result that a report of the study shows; 0: none."""
    inputs = [
        workdir / "study.json",
        workdir / "sweep" / "learning_rates.json",
        *workdir.glob("runs/*/*/summary.json"),
        *workdir.glob("downstream/*/*.json"),
        *workdir.glob("surgery/*/*.csv"),
    ]
    return max((path.stat().st_mtime_ns for path in inputs if path.exists()), default=0)


def _progress(directory: RunDirectory, num_steps: int) -> str:
    """How far an unfinished run has come, and whether a kill has cut its last line."""
    rows = directory.read_metrics() if directory.metrics.exists() else []
    done = f"at step {rows[-1]['step']:,}" if rows else "before step 1"
    lines = sum(map(bool, directory.metrics.read_bytes().split(b"\n"))) if rows else 0
    torn = "; the torn last line of metrics.jsonl is skipped" if lines > len(rows) else ""
    return f"unfinished, {done} of {num_steps:,}{torn}"


def _probe(row: Mapping[str, Any]) -> Probe:
    names = (name for name in row if name not in ("step", "tokens"))
    metrics = {name: row[name] for name in names if not name.startswith(("train/", "perf/"))}
    return Probe(row["step"], row["tokens"], metrics)
