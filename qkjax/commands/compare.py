"""Runs side by side: qkjax compare RUN RUN ... [--measure=pr] [--vectors=key]

Writes a CSV (run, arm, seed, step, tokens, layer, head, value, difference to the first run) and a
figure of one measure, per layer and head, after the same number of training tokens; and a figure of
the measure over training. Prints losses, means and the settings in which a run differs from the
first. The runs must share dataset, validation tokens and shapes. Directories of qkjax measure may
be among them: then each has its own text and shape, and the figure shows the share of head_dim
against depth, without differences.
"""

import pathlib

from absl import flags

from qkjax import files
from qkjax.cli import command_line
from qkjax.report import drawing, quantities, run_spectra

FLAGS = flags.FlagValues()
_MEASURE = flags.DEFINE_enum(
    "measure",
    "pr",
    quantities.NAMES,
    "A measure of singular values, or an array that is saved per head.",
    flag_values=FLAGS,
)
_VECTORS = flags.DEFINE_enum(
    "vectors",
    None,
    quantities.VECTORS,
    "The vectors to compare; wqk is W_q^T W_k, qk the products q.k. Default: key.",
    flag_values=FLAGS,
)
_STAGE = flags.DEFINE_enum(
    "stage",
    None,
    quantities.STAGES,
    "Stage of keys and queries. Default: post_rope.",
    flag_values=FLAGS,
)
_CENTRING = flags.DEFINE_enum(
    "centring",
    None,
    quantities.CENTRINGS,
    "centred: the mean vector is removed. Default: raw.",
    flag_values=FLAGS,
)
_STEP = flags.DEFINE_integer(
    "step",
    None,
    "Step of an evaluation of the first RUN. Default: the last one that all runs have.",
    flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Directory for the figure and its CSV. Default: figures/ of the first RUN.",
    flag_values=FLAGS,
)
_FORMAT = flags.DEFINE_list(
    "format", "svg,png", "Format of the figure: svg, png or both.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_compare, FLAGS, __doc__, positionals=["RUN..."])


def _compare(*workdirs: str) -> None:
    from qkjax.report import figures

    formats = drawing.check_formats(_FORMAT.value)
    quantity = quantities.quantity(_MEASURE.value, _VECTORS.value, _STAGE.value, _CENTRING.value)
    runs = run_spectra.load_runs(workdirs)
    compared = run_spectra.compare(runs, quantity, _STEP.value)
    print(*run_spectra.comparison_lines(compared, quantity), sep="\n")
    out = pathlib.Path(_OUT.value) if _OUT.value else runs[0].workdir / "figures"
    stem = out / f"compare_{quantity.name}"
    path = stem.with_suffix(".csv")
    files.replace(path, run_spectra.comparison_csv(compared).encode())
    print(path)  # before the figure, which needs matplotlib
    if any(run.is_model for run in runs):
        drawn = {stem: figures.beside(compared, quantity)}
    else:
        drawn = {
            stem: figures.comparison(compared, quantity),
            stem.with_name(f"{stem.name}_trajectory"): figures.trajectories(runs, [quantity]),
        }
    for stem, figure in drawn.items():
        for path in drawing.save(figure, stem, formats):
            print(path)
