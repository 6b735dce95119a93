"""Study directories whose truth is known, written as real runs leave them; nothing is trained.

    arms = synthetic_study.arms(adamw_qk={PR: 16.0})      # the other numbers as in DEFAULTS
    synthetic_study.write(directory, arms, seeds=(42, 43, 44), noise={PR: 0.5})
    study = results.load_study(directory)

A number is where a metric ends; its course is linear from START. {step: value} gives the course.
"""

import functools
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from qkjax import config as config_lib
from qkjax import files
from qkjax.cli import config_flag
from qkjax.runs import environment
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan as plan_lib
from qkjax.trained import rank_curves

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOSS, PR, PR_BEFORE, AA = (
    "val/loss",
    "pr/key/post_rope/raw",
    "pr/key/pre_rope/centred",
    "aa/key",
)
LOGIT = "attention/max_logit"
ARMS = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
FINGERPRINT, COMMIT = "0" * 64, "c" * 40
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
    optimizer, qk, *controls = arm.replace("to_one", "to-one").split("_")
    controls = [word.replace("-", "_") for word in controls]
    words = ",".join([scale, recipe, *controls])
    values = config_lib.base(optimizer, "none" if qk == "noqk" else "learned", words)
    values.seed = seed
    values.data.dir = "data/synthetic"
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (values[section] if section else values)[field] = value
    return config_lib.resolve(values).for_platform("cpu")


def load_config(words: str) -> ml_collections.ConfigDict:
    """configs/study.py at `words`."""
    return config_flag.load(ROOT / "configs" / "study.py", words)


def make_plan(words: str, **fields: Any) -> plan_lib.Plan:
    """The plan at `words`; fields are dotted names with '__' for the dot."""
    values = load_config(words)
    values.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return plan_lib.make_plan(values)


def write(
    directory: pathlib.Path,
    arms: Mapping[str, Mapping[str, Course]],
    *,
    seeds: Sequence[int] = (42, 43, 44),
    extra_seeds: Mapping[str, Sequence[int]] | None = None,
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
        extra_seeds: of some arms alone, by arm.
        noise: standard deviation between runs by metric, or by metric and arm; what a seed does
            to all arms alike is 3 times as large. It grows linearly from 0 over the run.
        missing: runs that are not there. diverged: the step after which the run has no more.
        spikes: (step, height) added to the training loss.
        fields: overrides of every config, as `make_config` takes them.
    """
    plan = {
        "format_version": 1,
        "scale": scale,
        "recipe": recipe,
        "words": f"{scale},{recipe}",
        "quick": False,
        "arms": [arm for arm in arms if arm in ARMS],
        "controls": [arm for arm in arms if arm not in ARMS],
        "parents": {arm: "_".join(arm.split("_")[:2]) for arm in arms if arm not in ARMS},
        "seeds": list(seeds),
        "extra_seeds": {arm: list(extra) for arm, extra in (extra_seeds or {}).items()},
        "tuning_seed": 7,
        "sweep": None,
        "steps": [],
        "tokens": make_config(ARMS[0], seeds[0], scale, recipe, **(fields or {})).train.tokens,
        "overrides": [],
        "fingerprint": FINGERPRINT,
    }
    files.write_json(directory / "study.json", plan)
    random = np.random.default_rng(random_seed)
    of_arm = {arm: [*seeds, *(extra_seeds or {}).get(arm, ())] for arm in arms}
    for seed in dict.fromkeys(itertools.chain(*of_arm.values())):
        common = {metric: random.standard_normal() for metric in DEFAULTS}
        for arm, courses in arms.items():
            if seed not in of_arm[arm]:
                continue
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
                courses,
                shift,
                diverged_after=(diverged or {}).get((arm, seed)),
                spike=(spikes or {}).get((arm, seed)),
                sequences=sequences,
                spectra=spectra,
            )
    return directory


def write_downstream(
    directory: pathlib.Path,
    right: Mapping[str, float],
    *,
    seeds: Sequence[int] = (42, 43, 44),
    items: int = 1_000,
    sample: bool = False,
    random_seed: int = 0,
    spread: float = 0.004,
) -> None:
    """downstream/ of the runs that are there: by arm the share of items answered right.

    An item is as hard for every run; `right` is the mean of both tasks' accuracies, from which
    runs stray with the standard deviation `spread`. The byte-exact
    subset is the first half of the items.
    """
    random = np.random.default_rng(random_seed)
    hard = random.standard_normal(items)
    for arm, share in right.items():
        for seed in seeds:
            noise = 0.5 * random.standard_normal((2, items))
            own = share + spread * random.standard_normal()
            skill = np.quantile(hard + noise[0], own)
            lines = []
            for index in range(items):
                hella, word = hard[index] + noise[:, index] < skill
                name = {"index": index, "item_sha256": f"{index:064x}"}
                likely = [-10.0, -10.0, -10.0, -9.0 + share if hella else -11.0 + share]
                lines.append(
                    {
                        "task": "hellaswag",
                        **name,
                        "log_likelihoods": likely,
                        "gold": 3,
                        "acc": int(hella),
                        "acc_norm": int(hella),
                    }
                )
                lines.append(
                    {
                        "task": "lambada",
                        **name,
                        "log_likelihood": float(-3 - hard[index]),
                        "greedy": bool(word),
                        "acc": int(word),
                    }
                )
            path = directory / "downstream" / arm / f"seed_{seed}.json"
            files.write_json(path, _downstream(arm, seed, lines, sample))
            text = "".join(json.dumps(line) + "\n" for line in lines)
            path.with_suffix(".items.jsonl").write_text(text)


def _downstream(
    arm: str, seed: int, lines: Sequence[Mapping[str, Any]], sample: bool
) -> dict[str, Any]:
    tasks = {}
    for task, shots, names in (("hellaswag", 10, ("acc", "acc_norm")), ("lambada", 0, ("acc",))):
        items = [line for line in lines if line["task"] == task]
        half = items[: len(items) // 2]
        measured = {name: _accuracy([item[name] for item in items]) for name in names}
        if task == "lambada":
            likely = [item["log_likelihood"] for item in items]
            measured["perplexity"] = {"value": math.exp(-float(np.mean(likely))), "stderr": 0.5}
        exact = {name: _accuracy([item[name] for item in half]) for name in names}
        tasks[task] = {
            "name": task,
            "num_fewshot": shots,
            "n": len(items),
            "metrics": measured,
            "byte_exact": {"n": len(half), "metrics": exact},
            "truncated": 0,
            "data_sha256": {f"{task}.jsonl": ("5" if sample else "d") * 64},
        }
    return {
        "format_version": 1,
        "backend": "jax",
        "sample": sample,
        "limit": None,
        "run": {
            "arm": arm,
            "seed": seed,
            "step": 1,
            "params_sha256": f"{arm}-{seed}",
            "dataset_fingerprint": FINGERPRINT,
        },
        "tasks": tasks,
        "bos": {
            "added": True,
            "token": "<|endoftext|>",
            "token_id": 0,
            "why": "documents in training came after it",
        },
        "versions": {"qkjax": "0.1.0"},
        "wall_seconds": 1.0,
    }


def _accuracy(right: Sequence[int]) -> dict[str, float]:
    share = float(np.mean(right))
    return {"value": share, "stderr": math.sqrt(share * (1 - share) / len(right))}


def write_sweep(
    directory: pathlib.Path,
    losses: Mapping[str, Mapping[float, float | None]],
    *,
    edge: Mapping[str, str] | None = None,
    extended: Sequence[str] = (),
    prs: Mapping[str, Mapping[float, float]] | None = None,
) -> None:
    """sweep/learning_rates.json: by arm and learning rate the loss; None: that run diverged.

    Args:
        prs: by arm and learning rate the PR at the end: these sweep runs, of scale tiny, are there.
    """
    for arm, by_rate in (prs or {}).items():
        for rate, ratio in by_rate.items():
            write_run(
                directory / "sweep" / arm / f"lr_{rate:.6g}",
                make_config(arm, 7, "tiny", optimizer__learning_rate=rate),
                {**arms(32)["muon_qk"], PR: ratio},
                dict.fromkeys(DEFAULTS, 0.0),
            )
    entries = {}
    for arm, by_rate in losses.items():
        sound = {rate: loss for rate, loss in by_rate.items() if loss is not None}
        chosen = min(sound, key=sound.__getitem__) if sound else None
        reached = [START[LOSS] if loss is None else loss for loss in by_rate.values()]
        entries[arm] = {
            "grid": sorted(by_rate),
            "chosen": chosen,
            "edge": (edge or {}).get(arm),
            "extended": arm in extended,
            "loss_at_init": START[LOSS],
            "fingerprint": FINGERPRINT,
            "sensitivity": float(np.mean(reached)) - sound[chosen] if sound else None,
            "runs": [
                {
                    "learning_rate": rate,
                    "loss": loss,
                    "loss_whole": loss and loss + 0.01,
                    "diverged": loss is None,
                    "directory": f"sweep/{arm}/lr_{rate:.6g}",
                }
                for rate, loss in sorted(by_rate.items())
            ],
        }
    files.write_json(directory / "sweep" / "learning_rates.json", entries)


def write_surgery(
    directory: pathlib.Path, used: Mapping[str, Sequence[int]], seeds: Sequence[int]
) -> None:
    """surgery/ of some runs: by arm and seed the directions within 0.01 nat of 32."""
    for arm, ranks in used.items():
        for seed, rank in zip(seeds, ranks, strict=True):
            rows = [
                rank_curves.Row(
                    *("all", "pre_rope", "centred", "top"),
                    *(kept, None, 65_536, f"{arm}-{seed}"),
                    *(3.5, 0.0 if kept >= rank else 0.02 * (rank - kept)),
                )
                for kept in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
            ]
            path = directory / "surgery" / arm / f"seed_{seed}.csv"
            files.replace(path, rank_curves.to_csv(rows))


def _typical(noise: float | Mapping[str, float]) -> float:
    return min(noise.values()) if isinstance(noise, Mapping) else noise


def write_run(
    workdir: pathlib.Path,
    run_config: config_lib.Config,
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
    files.write_json(workdir / "config.json", run_config.to_dict())
    files.write_json(workdir / "environment.json", _environment(run_config, fingerprint))
    rows, summary = [], {}
    for step in range(end + 1):
        row: dict[str, Any] = {"step": step, "tokens": step * train.tokens_per_step}
        if step:
            row |= {
                "train/loss": at[LOSS](step) + (spike[1] if spike and spike[0] == step else 0.0),
                "train/grad_norm": 1.0,
                "train/learning_rate": run_config.optimizer.learning_rate,
                "train/epoch": 0,
            }
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
        summary["train/loss"] = None
    elif run_config.eval.final_tokens >= 0:
        measured = _metrics({metric: course(last) for metric, course in at.items()}, run_config)
        for name, value in measured.items():
            family, _, rest = name.partition("/")
            summary[f"{family}_final/{rest}"] = value
        _write_losses(workdir, "final", measured[LOSS], run_config, sequences)
        if spectra:
            _write_spectra(workdir, "final", measured, run_config)
    lines = [json.dumps(files.plain(row)) for row in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    RunDirectory(workdir).write_summary(
        {
            **summary,
            "arm": run_config.arm,
            "seed": run_config.seed,
            "step": end,
            "tokens": end * train.tokens_per_step,
            "epochs": 1,
            "params_sha256": f"{run_config.arm}-{run_config.seed}",
            "diverged": diverged_after is not None,
            "diverged_step": None if diverged_after is None else diverged_after + 1,
            "wall_seconds": 1.0,
        },
    )


def seal(directory: pathlib.Path) -> None:
    """Makes every finished run below `directory` one that has ended with the files it has now."""
    for path in directory.rglob("summary.json"):
        summary = json.loads(path.read_bytes())
        for name in ("files", files.SEAL):
            summary.pop(name, None)
        RunDirectory(path.parent).write_summary(summary)


def edit_sealed(path: pathlib.Path, old: str, new: str) -> None:
    """Replaces text in a JSON file that has a digest of its own, which then is the new one's."""
    values = json.loads(path.read_text().replace(old, new))
    files.write_sealed(path, values)


def _environment(run_config: config_lib.Config, fingerprint: str) -> dict[str, Any]:
    """environment.json of one start at a commit that there is not."""
    command = [
        "python",
        "-m",
        "qkjax.main",
        f"--config=configs/{run_config.arm}.py",
        f"--config.seed={run_config.seed}",
    ]
    described = _described()
    return {
        "dataset_fingerprint": fingerprint,
        **described,
        "command": command,
        "git": {**described["git"], "sha": COMMIT, "dirty": False},
        "starts": [{"time": "2026-11-26T00:00:00+00:00", "command": command}],
    }


@functools.cache
def _described() -> dict[str, Any]:
    """What a run on this machine records: the fields are those of the code that writes them."""
    return environment.describe(())


def _course(course: Course, start: float, shift: float, last: int):
    points = {0: start, **course} if isinstance(course, Mapping) else {0: start, last: course}
    steps, values = list(points), list(points.values())
    return lambda step: float(np.interp(step, steps, values)) + shift * step / last


def _metrics(known: Mapping[str, float], run_config: config_lib.Config) -> dict[str, float]:
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
    workdir: pathlib.Path, name: str, loss: float, run_config: config_lib.Config, sequences: int
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


def _spectra(ratios: np.ndarray, size: int) -> np.ndarray:
    """[..., size] geometric singular values with these participation ratios [...]."""
    low, high = np.zeros_like(ratios), np.full_like(ratios, 20.0)
    for _ in range(60):
        decay = (low + high) / 2
        sigma = np.exp(-decay[..., None] * np.arange(size))
        above = sigma.sum(axis=-1) ** 2 / (sigma**2).sum(axis=-1) > ratios
        low, high = np.where(above, decay, low), np.where(above, high, decay)
    return 100 * sigma


def _write_spectra(
    workdir: pathlib.Path, name: str, row: Mapping[str, Any], run_config: config_lib.Config
) -> None:
    """The arrays of docs/run_directory.md: layers and heads differ, their mean is the metric."""
    shape = run_config.model
    counts = {"key": shape.num_kv_heads, "query": shape.num_heads, "value": shape.num_kv_heads}

    def of(heads: int, value: float) -> np.ndarray:
        layers = np.linspace(0.8, 1.2, shape.num_layers)[:, None]
        return (value * layers * np.linspace(0.95, 1.05, heads)).astype(np.float32)

    def spectra(heads: int, ratio: float) -> np.ndarray:
        room = min(1.0, (shape.head_dim / ratio - 1) / 0.26, (1 - 1 / ratio) / 0.24)
        ratios = ratio + room * (of(heads, ratio).astype(np.float64) - ratio)
        return _spectra(ratios, shape.head_dim).astype(np.float32)

    arrays: dict[str, np.ndarray] = {}
    for vector, heads in counts.items():
        for stage in ("", "_pre_rope", "_post_rope"):
            if (vector == "value") != (stage == ""):
                continue
            for centring in ("raw", "centred"):
                ratio = row[PR_BEFORE] if stage == "_pre_rope" else row[PR]
                arrays[f"{vector}{stage}_{centring}"] = spectra(heads, ratio)
            mean = np.full((shape.num_layers, heads, shape.head_dim), 0.1, np.float32)
            arrays[f"{vector}{stage}_mean"] = mean
    if shape.qk_norm != "none":
        kept = min(1.0, row[PR] / _scaled(START, shape.head_dim)[PR])
        frozen = shape.qk_norm == "frozen"
        for gamma in ("gamma_q", "gamma_k"):  # from 1 to a slope around the share of PR kept
            spread = np.linspace(1.5 * kept - 0.5, 0.5 + 0.5 * kept, shape.head_dim)
            values = np.ones_like(spread) if frozen else spread
            arrays[gamma] = np.tile(values, (shape.num_layers, 1)).astype(np.float32)
    arrays["max_logit"] = of(shape.num_heads, row[LOGIT])
    arrays["entropy"] = of(shape.num_heads, 3.0)
    for vector in ("key", "query"):
        for size, value in (("mean", 8.0), ("p99", 10.0), ("max", 12.0)):
            arrays[f"{vector}_norm_{size}"] = of(counts[vector], value)
    arrays["wqk_singular_values"] = spectra(shape.num_heads, 0.5 * shape.head_dim)
    for name_, value in (("aa", row[AA]), ("aa_ratio", 0.7), ("overlap", 0.2)):
        arrays[name_] = of(shape.num_kv_heads, value)
    arrays["num_tokens"] = np.float32(1_048_576)
    (workdir / "spectra").mkdir(exist_ok=True)
    np.savez(workdir / "spectra" / f"{name}.npz", **arrays)
