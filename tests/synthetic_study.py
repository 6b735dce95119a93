"""Study directories whose truth is known, written as real runs leave them; nothing is trained.

    arms = synthetic_study.arms(adamw_qk={PR: 16.0})      # the other numbers as in DEFAULTS
    synthetic_study.write(directory, arms, seeds=(42, 43, 44), noise={PR: 0.5})
    study = results.load_study(directory)

A number is where a metric ends; its course is linear from START. {step: value} gives the course.
"""

import json
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkjax import config, run_directory

LOSS, PR, PR_BEFORE, AA = (
    "val/loss", "pr/key/post_rope/raw", "pr/key/pre_rope/centred", "aa/key",
)  # fmt: skip
LOGIT = "attention/max_logit"
ARMS = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
FINGERPRINT = "0" * 64
# All arms alike: the null study. Metrics not named here follow from these, see `_metrics`.
DEFAULTS: dict[str, float] = {LOSS: 3.5, PR: 40.0, PR_BEFORE: 30.0, AA: 0.2, LOGIT: 20.0}
START: dict[str, float] = {LOSS: 10.8, PR: 60.0, PR_BEFORE: 58.0, AA: 0.0, LOGIT: 3.0}

Course = float | Mapping[int, float]
Arms = dict[str, dict[str, Course]]


def arms(head_dim: int = 64, /, **changed: Mapping[str, Course]) -> Arms:
    """DEFAULTS for every arm, with changes by arm; other names than the four are controls."""
    names = (*ARMS, *(name for name in changed if name not in ARMS))
    defaults = _scaled(DEFAULTS, head_dim)
    return {name: {**defaults, **changed.get(name, {})} for name in names}


def _scaled(numbers: Mapping[str, float], head_dim: int) -> dict[str, float]:
    """Participation ratios are of `head_dim`, the numbers above of 64."""
    ratios = (PR, PR_BEFORE)
    return {name: x * head_dim / 64 if name in ratios else x for name, x in numbers.items()}


def make_config(arm: str, seed: int, scale: str = "pilot", recipe: str = "fixed", **fields: Any):
    """The resolved config of an arm by its name; fields are dotted names with '__' for the dot."""
    optimizer, qk, *controls = arm.split("_")
    words = ",".join([scale, recipe, *controls])
    values = config.base(optimizer, "none" if qk == "noqk" else "learned", words)
    values.seed = seed
    values.data.dir = "data/synthetic"
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (values[section] if section else values)[field] = value
    return config.resolve(values).for_platform("cpu")


def write(
    directory: pathlib.Path,
    arms: Mapping[str, Mapping[str, Course]],
    *,
    seeds: Sequence[int] = (42, 43, 44),
    noise: Mapping[str, float | Mapping[str, float]] | None = None,
    scale: str = "pilot",
    recipe: str = "fixed",
    missing: Sequence[tuple[str, int]] = (),
    diverged: Mapping[tuple[str, int], int] | None = None,
    spikes: Mapping[tuple[str, int], tuple[int, float]] | None = None,
    sequences: int = 16,
    spectra: bool = False,
    random_seed: int = 0,
    fields: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes study.json and every run of the plan.

    Args:
        arms: by arm, by metric, its course; see `arms`.
        noise: standard deviation between runs by metric, or by metric and arm; what a seed does
            to all arms alike is 3 times as large. It grows linearly from 0 over the run.
        missing: runs that are not there. diverged: the step after which the run has no more.
        spikes: (step, height) added to the training loss.
        fields: overrides of every config, as `make_config` takes them.
    """
    plan = {
        "format_version": 1, "scale": scale, "recipe": recipe, "words": f"{scale},{recipe}",
        "quick": False, "arms": [arm for arm in arms if arm in ARMS],
        "controls": [arm for arm in arms if arm not in ARMS],
        "parents": {arm: "_".join(arm.split("_")[:2]) for arm in arms if arm not in ARMS},
        "seeds": list(seeds), "tuning_seed": 7, "sweep": None, "steps": [],
        "fingerprint": FINGERPRINT,
    }  # fmt: skip
    run_directory.write_json(directory / "study.json", plan)
    random = np.random.default_rng(random_seed)
    for seed in seeds:
        common = {metric: random.standard_normal() for metric in DEFAULTS}
        for arm, courses in arms.items():
            shift = {}
            for metric in DEFAULTS:
                sd = (noise or {}).get(metric, 0.0)
                sd = sd.get(arm, 0.0) if isinstance(sd, Mapping) else sd
                typical = _typical((noise or {}).get(metric, 0.0))
                shift[metric] = 3 * typical * common[metric] + sd * random.standard_normal()
            if (arm, seed) in missing:
                continue
            write_run(
                directory / "runs" / arm / f"seed_{seed}",
                make_config(arm, seed, scale, recipe, **(fields or {})),
                courses, shift,
                diverged_after=(diverged or {}).get((arm, seed)),
                spike=(spikes or {}).get((arm, seed)),
                sequences=sequences, spectra=spectra,
            )  # fmt: skip
    return directory


def write_downstream(
    directory: pathlib.Path,
    right: Mapping[str, float],
    *,
    seeds: Sequence[int] = (42, 43, 44),
    items: int = 1_000,
    sample: bool = False,
    random_seed: int = 0,
) -> None:
    """downstream/ of the runs that are there: by arm the share of items answered right.

    An item is as hard for every run; `right` is the mean of both tasks' accuracies.
    """
    random = np.random.default_rng(random_seed)
    hard = random.standard_normal(items)
    for arm, share in right.items():
        for seed in seeds:
            noise = 0.5 * random.standard_normal((2, items))
            skill = np.quantile(hard + noise[0], share)
            lines = []
            for index in range(items):
                hella, word = hard[index] + noise[:, index] < skill
                name = {"index": index, "item_sha256": f"{index:064x}"}
                likely = [-10.0, -10.0, -10.0, -9.0 + share if hella else -11.0 + share]
                lines.append({"task": "hellaswag", **name, "log_likelihoods": likely, "gold": 3,
                              "acc": int(hella), "acc_norm": int(hella)})  # fmt: skip
                lines.append({"task": "lambada", **name, "log_likelihood": float(-3 - hard[index]),
                              "greedy": bool(word), "acc": int(word)})  # fmt: skip
            path = directory / "downstream" / arm / f"seed_{seed}.json"
            run_directory.write_json(
                path, {"run": {"params_sha256": f"{arm}-{seed}"}, "sample": sample, "tasks": {}}
            )
            text = "".join(json.dumps(line) + "\n" for line in lines)
            path.with_suffix(".items.jsonl").write_text(text)


def _typical(noise: float | Mapping[str, float]) -> float:
    return min(noise.values()) if isinstance(noise, Mapping) else noise


def write_run(
    workdir: pathlib.Path,
    run_config: config.Config,
    courses: Mapping[str, Course],
    shift: Mapping[str, float],
    *,
    diverged_after: int | None = None,
    spike: tuple[int, float] | None = None,
    sequences: int = 16,
    spectra: bool = False,
    fingerprint: str = FINGERPRINT,
) -> None:
    """One finished run: config, environment, metrics, validation losses, summary, spectra."""
    train, last = run_config.train, run_config.train.num_steps
    start = _scaled(START, run_config.model.head_dim)
    end = last if diverged_after is None else diverged_after
    at = {
        metric: _course(course, start[metric], shift[metric], last)
        for metric, course in courses.items()
    }
    run_directory.write_json(workdir / "config.json", run_config.to_dict())
    run_directory.write_json(workdir / "environment.json", {"dataset_fingerprint": fingerprint})
    rows, summary = [], {}
    for step in range(end + 1):
        row: dict[str, Any] = {"step": step, "tokens": step * train.tokens_per_step}
        if step:
            row |= {
                "train/loss": at[LOSS](step) + (spike[1] if spike and spike[0] == step else 0.0),
                "train/grad_norm": 1.0, "train/learning_rate": run_config.optimizer.learning_rate,
                "train/epoch": 0,
            }  # fmt: skip
        if step in run_config.eval.steps:
            row |= _metrics({metric: course(step) for metric, course in at.items()}, run_config)
            _write_losses(workdir, f"step_{step:08d}", row[LOSS], run_config, sequences)
            if spectra:
                _write_spectra(workdir, f"step_{step:08d}", row, run_config)
        rows.append(row)
        summary |= {name: value for name, value in row.items() if "/" in name}
    if diverged_after is not None:  # the row of the step that was not finite
        tokens = (end + 1) * train.tokens_per_step
        rows.append({"step": end + 1, "tokens": tokens, "train/loss": None})
    elif run_config.eval.final_tokens >= 0:
        measured = _metrics({metric: course(last) for metric, course in at.items()}, run_config)
        for name, value in measured.items():
            family, _, rest = name.partition("/")
            summary[f"{family}_final/{rest}"] = value
        _write_losses(workdir, "final", measured[LOSS], run_config, sequences)
        if spectra:
            _write_spectra(workdir, "final", measured, run_config)
    lines = [json.dumps(run_directory.plain(row)) for row in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run_directory.write_summary(
        workdir,
        {
            **summary, "arm": run_config.arm, "seed": run_config.seed, "step": end,
            "tokens": end * train.tokens_per_step, "epochs": 1,
            "params_sha256": f"{run_config.arm}-{run_config.seed}",
            "diverged": diverged_after is not None,
            "diverged_step": None if diverged_after is None else diverged_after + 1,
            "wall_seconds": 1.0,
        },
    )  # fmt: skip


def _course(course: Course, start: float, shift: float, last: int):
    points = {0: start, **course} if isinstance(course, Mapping) else {0: start, last: course}
    steps, values = list(points), list(points.values())
    return lambda step: float(np.interp(step, steps, values)) + shift * step / last


def _metrics(known: Mapping[str, float], run_config: config.Config) -> dict[str, float]:
    """The known ones, and others of an evaluation that follow from them."""
    return {
        **known,
        "val/perplexity": math.exp(known[LOSS]),
        "pr/key/pre_rope/raw": 0.9 * known[PR_BEFORE],
        "pr/key/post_rope/centred": known[PR],
        "pr_cov/key/pre_rope/centred": 0.7 * known[PR_BEFORE],
        "attention/entropy": 3.0,
        "overlap/key": 0.2,
        "wqk/pr": 0.5 * run_config.model.head_dim,
        "norm/key": 8.0,
        "norm/query": 8.0,
    }


def _write_losses(
    workdir: pathlib.Path, name: str, loss: float, run_config: config.Config, sequences: int
) -> None:
    """Sequences of different difficulty, whose mean is the loss."""
    length = run_config.model.sequence_length
    random = np.random.default_rng(zlib.crc32(f"{run_config.arm}-{run_config.seed}".encode()))
    own = 0.01 * random.standard_normal(sequences)  # beside what every run finds hard
    difficulty = np.linspace(-0.5, 0.5, sequences) + own - own.mean()
    (workdir / "validation").mkdir(exist_ok=True)
    np.savez(
        workdir / "validation" / f"{name}.npz",
        loss_sum=(length * (loss + difficulty)).astype(np.float32),
        count=np.full(sequences, length, np.float32),
    )


def _spectrum(ratio: float, size: int) -> np.ndarray:
    """Geometric singular values with this participation ratio."""
    low, high = 0.0, 20.0
    for _ in range(60):
        decay = (low + high) / 2
        sigma = np.exp(-decay * np.arange(size))
        low, high = (decay, high) if sigma.sum() ** 2 / (sigma**2).sum() > ratio else (low, decay)
    return 100 * sigma


def _write_spectra(
    workdir: pathlib.Path, name: str, row: Mapping[str, Any], run_config: config.Config
) -> None:
    """The arrays of DESIGN.md section 4; every head and layer alike."""
    shape = run_config.model
    counts = {"key": shape.num_kv_heads, "query": shape.num_heads, "value": shape.num_kv_heads}

    def of(heads: int, values: Any = 1.0, *inner: int) -> np.ndarray:
        full = np.broadcast_to(values, (shape.num_layers, heads, *inner))
        return full.astype(np.float32)

    arrays: dict[str, np.ndarray] = {}
    for vector, heads in counts.items():
        for stage in ("", "_pre_rope", "_post_rope"):
            if (vector == "value") != (stage == ""):
                continue
            for centring in ("raw", "centred"):
                ratio = row[PR_BEFORE] if stage == "_pre_rope" else row[PR]
                sigma = _spectrum(min(ratio, shape.head_dim), shape.head_dim)
                arrays[f"{vector}{stage}_{centring}"] = of(heads, sigma, shape.head_dim)
            arrays[f"{vector}{stage}_mean"] = of(heads, 0.1, shape.head_dim)
    if shape.qk_norm != "none":
        for gamma in ("gamma_q", "gamma_k"):
            arrays[gamma] = np.full((shape.num_layers, shape.head_dim), 0.8, np.float32)
    arrays["max_logit"] = of(shape.num_heads, row[LOGIT])
    arrays["entropy"] = of(shape.num_heads, 3.0)
    for vector in ("key", "query"):
        for size, value in (("mean", 8.0), ("p99", 10.0), ("max", 12.0)):
            arrays[f"{vector}_norm_{size}"] = of(counts[vector], value)
    arrays["wqk_singular_values"] = of(
        shape.num_heads, _spectrum(0.5 * shape.head_dim, shape.head_dim), shape.head_dim
    )
    for name_, value in (("aa", row[AA]), ("aa_ratio", 0.7), ("overlap", 0.2)):
        arrays[name_] = of(shape.num_kv_heads, value)
    arrays["num_tokens"] = np.float32(1_048_576)
    (workdir / "spectra").mkdir(exist_ok=True)
    np.savez(workdir / "spectra" / f"{name}.npz", **arrays)
