"""The commands: `qkjax VERB`, one module per verb; tools/*.py are the same commands as files.

Each module has a `main()`, which reads sys.argv and ends the process. This one imports none of
them, so that the list of verbs is there at once.
"""

import importlib
import sys

from qkjax import __version__, errors, presets
from qkjax.cli import arguments, command_line, startup

VERBS = {
    "prepare": "make a dataset from text",
    "check": "check a dataset, from its digests to its hold-out",
    "train": "train one arm, or resume it",
    "study": "sweep, train, export and report all arms",
    "report": "write the report of a study",
    "plot": "draw the spectra of a run",
    "compare": "draw the spectra of several runs together",
    "surgery": "measure the loss with projected keys",
    "generate": "continue a text",
    "export": "write a run as a Hugging Face directory",
    "evaluate": "score HellaSwag and LAMBADA",
    "measure": "measure the keys of a public model",
    "gallery": "compare models and runs on one page",
    "audit": "sum the decay of gammas over a run or a public recipe",
    "reproduction": "compare a study with the published one",
    "determinism": "repeat and resume a run, and compare the bits",
}


def main() -> None:
    """`qkjax VERB ...`; ends the process."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        del sys.argv[1]
        sys.argv[0] = f"qkjax {verb}"
        run(verb)
    sys.exit(command_line.exit_code(lambda: _answer(verb)))


def run(verb: str) -> None:
    """Prepares the process before numpy or jax is imported, then does what sys.argv asks for."""
    startup.prepare_process()
    importlib.import_module(f"qkjax.commands.{verb}").main()


def _answer(verb: str) -> None:
    """The argument that should be a verb."""
    if verb in ("--help", "-h", "help"):
        print(_help_text(), flush=True)
    elif verb == "--version":
        print(__version__, flush=True)
    else:
        raise errors.UsageError(
            f"{arguments.visible(verb)}: no such command."
            f"{presets.suggest(verb, tuple(VERBS))} Known: {', '.join(VERBS)}."
        )


def _help_text() -> str:
    lines = [f"  {verb:<12} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            f"qkjax {__version__}: does QK-Norm collapse attention keys?",
            "",
            *lines,
            "",
            "qkjax VERB --help lists the flags of a verb.",
        ]
    )
