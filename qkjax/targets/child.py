"""Compiles for a target in a process of its own: the question on stdin, answers on stdout, JSON.

A plugin of GPUs or TPUs that can be imported changes what jax does, so the process that computes
never sees one; `launch.ask` starts this.
"""

import json
import sys
from typing import Any

from qkjax import config as config_lib
from qkjax import errors, files
from qkjax.targets import devices, programs, target


def main() -> None:
    """Prints a line for every program, or one with an error."""
    question = files.parse_json(sys.stdin.buffer.read(), "stdin", "Use qkjax.targets.launch.ask")
    try:
        for answer in answers(question):
            print(json.dumps(answer), flush=True)
    except errors.QkjaxError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)


def answers(question: dict[str, Any]) -> Any:
    """What `launch.ask` asks: the config of a run, a target, and the names of programs."""
    aim = target.parse(question["target"])
    config = config_lib.from_dict(question["config"]).for_platform(aim.chip.platform)
    chosen = devices.of(aim)
    for compiled in programs.compile_for(config, chosen, tuple(question["programs"])):
        if question["keep_text"]:
            with open(f"{question['keep_text']}.{compiled.name}.hlo", "w") as file:
                file.write(compiled.text)
        yield programs.describe(compiled, aim)


if __name__ == "__main__":
    main()
