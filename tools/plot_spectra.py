"""Figures of one run's spectra: python tools/plot_spectra.py --workdir=RUN

Writes into RUN/figures: trajectories of a measure over training with bands over the layers,
layer x head heat maps, singular-value curves, gamma of QK-Norm, attention logits and entropy.
What the run has not recorded is left out with a note. To set runs side by side:
tools/compare_spectra.py.
"""

import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line
from qkjax.report import drawing, quantities, run_spectra

_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory.")
_OUT = flags.DEFINE_string("out", "", "Directory for the figures. Default: RUN/figures.")
_FORMAT = flags.DEFINE_list("format", "svg,png", "Of the figures: svg, png or both.")
_MEASURE = flags.DEFINE_enum(
    "measure", "pr", list(quantities.MEASURES), "Of trajectories and heat maps."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Evaluation of the heat maps. Default: the first and the last."
)


def main() -> None:
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


if __name__ == "__main__":
    command_line.run(main)
