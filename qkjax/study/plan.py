"""The whole study as data: its steps, what each needs and makes.

Pure: it reads config files and nothing else, runs nothing, and imports no jax. A step is one
idempotent command over one directory, so any scheduler can execute a plan.
"""

import dataclasses
import fnmatch
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from qkjax import buckets, errors, files, presets
from qkjax import config as config_lib
from qkjax.study import plan_arms, plan_config, questions
from qkjax.study.plan_arms import Arm
from qkjax.study.plan_config import StudyConfig

DATASET, SWEEP, EXTENSION, CHOICE, RUN, EXPORT, DOWNSTREAM, SURGERY, REPORT = KINDS = (
    "dataset",
    "sweep",
    "extension",
    "choice",
    "run",
    "export",
    "downstream",
    "surgery",
    "report",
)
TRAINING = (SWEEP, EXTENSION, RUN)  # kinds that train


@dataclasses.dataclass(frozen=True)
class Step:
    """One unit of work; its name is also the place of its result in the study directory."""

    name: str
    kind: str
    arm: str  # "" of dataset and report
    seed: int | None
    learning_rate: float | None  # None: the recipe's own, or not chosen yet
    needs: tuple[str, ...]  # names of steps
    fingerprint: str  # of everything that its result depends on, the data aside


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study, ready to be executed in the order of its steps."""

    study: StudyConfig
    arms: dict[str, Arm]  # controls included, in the order of the study
    left_out: dict[str, str]  # optional control -> the arm that trains the same
    steps: tuple[Step, ...]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all steps."""
        return plan_arms.digest([[step.name, step.fingerprint] for step in self.steps])

    def step(self, name: str) -> Step:
        """The step of that name."""
        return {step.name: step for step in self.steps}[name]

    def select(self, only: Sequence[str]) -> list[Step]:
        """The steps that one of `only` names: a name with wildcards, an arm, a kind; () is all.

        Raises:
            UsageError: one of them fits no step.
        """
        for wanted in only:
            if not any(_fits(step, wanted) for step in self.steps):
                raise errors.UsageError(
                    f"--only: {wanted!r} matches no step of the plan. Give a name such as "
                    "'runs/muon_qk/*' (--dry_run lists them), an arm "
                    f"({', '.join(self.arms)}), or a kind ({', '.join(KINDS)})."
                )
        steps = self.steps
        return [s for s in steps if not only or any(_fits(s, wanted) for wanted in only)]

    def grid(self, arm: str) -> tuple[float, ...]:
        """The learning rates of the arm's sweep, ascending."""
        base = self.arms[arm].base_rate
        return tuple(_round(factor * base) for factor in self.study.sweep.factors)

    def surgery_ranks(self, arm: str) -> tuple[int, ...]:
        """The directions that rank surgery keeps, ascending."""
        head_dim = self.arms[arm].config.model.head_dim
        eighths = (max(1, number * head_dim // 8) for number in range(1, 9))
        return self.study.surgery.ranks or tuple(sorted({1, 2, 4, *eighths}))

    def choice_of(self, arm: str) -> str | None:
        """The step that chooses the learning rate of an arm or control; None without a sweep."""
        return f"sweep/{self.arms[arm].parent}/choice" if self.study.sweep.tokens else None

    def run_config(self, step: Step, learning_rate: float | None) -> config_lib.Config:
        """The config of a training step; None keeps the arm's own rates."""
        fields = self._fields(step, learning_rate)
        return plan_arms.run_config(self.study, self.arms[step.arm], fields)

    def arguments(
        self, step: Step, directory: pathlib.Path, learning_rate: float | None
    ) -> list[str]:
        """The verb and the flags that train a step."""
        fields = self._fields(step, learning_rate)
        flags = plan_arms.flags(self.study, self.arms[step.arm], fields)
        return ["train", *flags, f"--workdir={directory}"]

    def _fields(self, step: Step, learning_rate: float | None) -> dict[str, Any]:
        """What the plan sets, after the overrides of the study."""
        study, arm = self.study, self.arms[step.arm]
        short = step.kind in (SWEEP, EXTENSION)
        fields: dict[str, Any] = {"seed": step.seed}
        if study.data_dir:
            fields["data.dir"] = _absolute(study.data_dir)
        fields["train.tokens"] = study.sweep.tokens if short else study.tokens
        if short:  # only its end is read
            fields |= {"eval.at_tokens": (), "eval.every_tokens": 0}
        if learning_rate is not None:
            fields["optimizer.learning_rate"] = learning_rate
            if arm.auxiliary_rate is not None:  # swept with it, by the same factor
                fields["optimizer.adam_learning_rate"] = _round(
                    arm.auxiliary_rate * learning_rate / arm.base_rate
                )
        return fields

    def unanswerable(self) -> dict[str, str]:
        """The hypotheses that this plan cannot answer, by name, and why: fixed with the plan."""
        config = next(iter(self.arms.values())).config
        return questions.unanswerable(list(self.arms), config, bool(self.study.downstream))

    def to_dict(self) -> dict[str, Any]:
        """As study.json holds it (docs/run_directory.md)."""
        study = self.study
        sweep = {
            "tokens": study.sweep.tokens,
            "grids": {arm: self.grid(arm) for arm in study.arms},
            "extend": study.sweep.extend,
        }
        return files.plain(
            {
                "format_version": 1,
                "scale": study.scale,
                "recipe": study.recipe,
                "words": ",".join([study.scale, study.recipe, *(["quick"] if study.quick else [])]),
                "quick": study.quick,
                "arms": list(study.arms),
                "controls": [name for name in self.arms if name not in study.arms],
                "left_out": self.left_out,
                "parents": {n: arm.parent for n, arm in self.arms.items() if n not in study.arms},
                "seeds": list(study.seeds),
                "extra_seeds": {arm: list(seeds) for arm, seeds in study.extra_seeds.items()},
                "tuning_seed": study.sweep.seed,
                "tokens": study.tokens,
                "sweep": sweep if study.sweep.tokens else None,
                "overrides": list(study.overrides),
                "export": study.export,
                "surgery": dataclasses.asdict(study.surgery) if study.surgery.tokens else None,
                "downstream": {"": "none", "hub": "hub"}.get(study.downstream, "folder"),
                "unanswerable": self.unanswerable(),
                "steps": [dataclasses.asdict(step) for step in self.steps],
                "fingerprint": self.fingerprint,
            }
        )


def _fits(step: Step, wanted: str) -> bool:
    return wanted in (step.arm, step.kind) or fnmatch.fnmatchcase(step.name, wanted)


def make_plan(values: ml_collections.ConfigDict) -> Plan:
    """Checks a study's config and lays out its steps.

    Raises:
        UsageError: fields that are wrong, all of them; an arm that does not exist; two arms that
            would train the same; extra seeds of an arm that is left out.
    """
    study = plan_config.resolve(values)
    bare = Plan(study, *plan_arms.make_arms(study), ())
    for name in study.extra_seeds:
        if twin := bare.left_out.get(name):
            raise errors.UsageError(
                f"extra_seeds: {name} is left out of the plan, because {twin} trains the same. "
                f"Give them to {twin}."
            )
    return dataclasses.replace(bare, steps=tuple(_steps(bare)))


def without_surgery(plan: Plan) -> Plan:
    """The plan as studies recorded it before rank surgery was one of their steps."""
    study = dataclasses.replace(plan.study, surgery=plan_config.SurgeryConfig(tokens=0, ranks=()))
    bare = dataclasses.replace(plan, study=study)
    return dataclasses.replace(bare, steps=tuple(_steps(bare)))


def with_seeds(plan: Plan, seeds: tuple[int, ...]) -> Plan:
    """The plan with other seeds, of which the first stays."""
    bare = dataclasses.replace(plan, study=dataclasses.replace(plan.study, seeds=seeds))
    return dataclasses.replace(bare, steps=tuple(_steps(bare)))


def _steps(plan: Plan) -> Iterator[Step]:
    study = plan.study
    made: dict[str, Step] = {}

    def step(
        name: str,
        kind: str,
        arm: str = "",
        seed: int | None = None,
        rate: float | None = None,
        needs: Sequence[str] = (),
        inputs: Any = None,
    ) -> Step:
        bare = Step(name, kind, arm, seed, rate, tuple(needs), "")
        if kind in TRAINING:
            inputs = plan.run_config(bare, rate).fingerprinted()
        above = [made[need].fingerprint for need in needs]
        fingerprint = plan_arms.digest([kind, inputs, above])
        made[name] = dataclasses.replace(bare, fingerprint=fingerprint)
        return made[name]

    yield step("dataset", DATASET, inputs=[study.scale, presets.former_recipe(study.recipe)])
    for arm in study.arms if study.sweep.tokens else ():
        names = [f"sweep/{arm}/lr_{rate:.6g}" for rate in plan.grid(arm)]
        for name, rate in zip(names, plan.grid(arm), strict=True):
            yield step(name, SWEEP, arm, study.sweep.seed, rate, ["dataset"])
        if study.sweep.extend:
            yield step(f"sweep/{arm}/extension", EXTENSION, arm, study.sweep.seed, None, names)
            names = [*names, f"sweep/{arm}/extension"]
        yield step(f"sweep/{arm}/choice", CHOICE, arm, None, None, names)
    seeds = dict.fromkeys(seed for name in plan.arms for seed in study.seeds_of(name))
    places = [(name, s) for s in seeds for name in plan.arms if s in study.seeds_of(name)]
    for name, seed in places:
        needs = [need for need in ("dataset", plan.choice_of(name)) if need]
        yield step(f"runs/{name}/seed_{seed}", RUN, name, seed, needs=needs)
    for name, seed in places if study.export else ():
        needs = [f"runs/{name}/seed_{seed}"]
        yield step(f"exports/{name}/seed_{seed}", EXPORT, name, seed, needs=needs)
    for name, seed in places:  # without data they count as skipped
        needs = [f"runs/{name}/seed_{seed}"]
        yield step(f"downstream/{name}/seed_{seed}", DOWNSTREAM, name, seed, needs=needs)
    for name, seed in places if study.surgery.tokens else ():
        needs = [f"runs/{name}/seed_{seed}"]
        ranks = plan.surgery_ranks(name)
        yield step(
            f"surgery/{name}/seed_{seed}",
            SURGERY,
            name,
            seed,
            needs=needs,
            inputs=[study.surgery.tokens, ranks],
        )
    yield step("report", REPORT, needs=list(made))


def _absolute(directory: str) -> str:
    if buckets.is_address(directory):
        return directory
    return str(pathlib.Path(directory).expanduser().absolute())


def _round(rate: float) -> float:
    """Six digits: what the name of its directory says is what is trained."""
    return float(f"{rate:.6g}")


def extended_rate(grid: Sequence[float], best: float) -> float | None:
    """The rate that follows the grid where its best one is at an edge, else None."""
    if len(grid) < 2:
        return None
    if best == grid[0]:
        return _round(grid[0] ** 2 / grid[1])
    return _round(grid[-1] ** 2 / grid[-2]) if best == grid[-1] else None


def shell_lines(plan: Plan, command: Sequence[str], directory: str) -> list[str]:
    """One line per step: a command that works by itself, and a comment with what it waits for.

        cd DIRECTORY && COMMAND --only=NAME  # line 15, stage 4, after 1,4

    Lines of one stage need only lines of earlier stages, so that a stage can be one array of jobs.
    The learning rate of a final run is read by its own line, from what the choice has recorded.

    Args:
        command: what executes a step when --only=NAME follows.
        directory: where the command is to run.
    """
    numbers = {step.name: number for number, step in enumerate(plan.steps, start=1)}
    stages: dict[str, int] = {}
    lines = []
    for step in plan.steps:
        stages[step.name] = 1 + max((stages[need] for need in step.needs), default=0)
        after = ",".join(str(numbers[need]) for need in step.needs) or "none"
        line = shlex.join([*command, f"--only={step.name}"])
        lines.append(
            f"cd {shlex.quote(directory)} && {line}  "
            f"# line {numbers[step.name]}, stage {stages[step.name]}, after {after}"
        )
    return lines
