"""The plan as lines for a scheduler: each does one step, and says which lines it waits for."""

import shlex
from collections.abc import Sequence

from qkjax.study.plan import Plan


def shell_lines(plan: Plan, command: Sequence[str], directory: str) -> list[str]:
    """One line a step: a command that works alone, and behind it as a comment what it waits for.

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
