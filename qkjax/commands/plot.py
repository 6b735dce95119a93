"""Figures of one run's spectra: qkjax plot --workdir=RUN

Writes into RUN/figures: trajectories of a measure over training with bands over the layers,
layer x head heat maps, singular-value curves, gamma of QK-Norm, attention logits and entropy.
What the run has not recorded is left out with a note. To compare runs: qkjax compare.
"""

import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line
from qkjax.report import drawing, quantities, run_spectra

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory.", flag_values=FLAGS)
_OUT = flags.DEFINE_string(
    "out", "", "Directory for the figures. Default: RUN/figures.", flag_values=FLAGS
)
_FORMAT = flags.DEFINE_list(
    "format", "svg,png", "Format of the figures: svg, png or both.", flag_values=FLAGS
)
_MEASURE = flags.DEFINE_enum(
    "measure",
    "pr",
    list(quantities.MEASURES),
    "Measure in trajectories and heat maps.",
    flag_values=FLAGS,
)
_STEP = flags.DEFINE_integer(
    "step",
    None,
    "Step of the evaluation in the heat maps. Default: the first and the last.",
    flag_values=FLAGS,
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_plot, FLAGS, __doc__)


def _plot() -> None:
    from qkjax.report import figures

    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing, expected a run directory. See --help.")
    formats = drawing.check_formats(_FORMAT.value)
    run = run_spectra.load_run(_WORKDIR.value)
    drawn, notes = figures.figures_of_run(run, _MEASURE.value, _STEP.value)
    out = pathlib.Path(_OUT.value) if _OUT.value else run.workdir / "figures"
    for note in notes:
        print(f"note: {note}")
    for name, figure in drawn.items():
        for path in drawing.save(figure, out / name, formats):
            print(path)
