"""The report of a study: index.html, report.md, results.csv and figures/*.svg, from its files."""

import os
import pathlib

from qkjax import files
from qkjax.report import (
    drawing,
    sections_confounds,
    sections_downstream,
    sections_keys,
    sections_losses,
    sections_record,
    sections_result,
    sections_verdicts,
)
from qkjax.report.blocks import Report, counted, seeds_named
from qkjax.report.csv import results_csv
from qkjax.report.html import page
from qkjax.report.markdown import markdown
from qkjax.report.material import Material, gather
from qkjax.runs.results import newest_input
from qkjax.verdicts import results

TITLE = "Does QK-Norm collapse attention keys?"


def make_report(workdir: str | pathlib.Path, out: str | pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a study, finished or not; returns the path of its page.

    Args:
        out: directory of the report; STUDY/report unless given.
    Raises:
        UsageError: no study, a damaged file, results that cannot be compared, or no matplotlib.
        StorageError: the disk failed.
    """
    drawing.check_available()
    newest = newest_input(pathlib.Path(workdir))
    material = gather(results.load_study(workdir))
    folder = pathlib.Path(out) if out else pathlib.Path(workdir) / "report"
    path = write(assemble(material), results_csv(material), folder)
    os.utime(path, ns=(newest, newest))  # so that a run that has finished meanwhile is newer
    return path


def write(report: Report, numbers: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes the files of a report, each as a whole; returns the path of its page.

    Args:
        numbers: the text of results.csv.
    Raises:
        StorageError: the disk failed.
    """
    pages = {
        **{f"figures/{chart.name}.svg": chart.svg for chart in report.charts},
        "results.csv": numbers.encode(),
        "report.md": markdown(report).encode(),
        "index.html": page(report),
    }
    for name, data in pages.items():
        files.replace(folder / name, data)
    for stale in set((folder / "figures").glob("*.svg")) - {folder / name for name in pages}:
        stale.unlink()  # of an earlier report
    return folder / "index.html"


def subtitle(material: Material) -> str:
    """What a report is of, in one sentence."""
    plan = material.study.plan
    extra = len(set(material.study.seeds) - set(plan["seeds"]))
    more = f" (some have {extra} more)" if extra else ""
    tokens = plan.get("tokens")
    budget = f", {drawing.count(tokens)} tokens each" if tokens else ""
    quick = ", quick" if plan.get("quick") else ""
    return (
        f"Report of a study at scale {plan['scale']}, recipe {plan['recipe']}{quick}: "
        f"{counted(len(material.study.arms), 'arm')}, {seeds_named(plan['seeds'])}{more}"
        f"{budget}."
    )


def assemble(material: Material) -> Report:
    """Every section, in the order of reading."""
    return Report(
        TITLE,
        subtitle(material),
        (
            sections_result.result(material),
            sections_verdicts.verdicts(material),
            sections_verdicts.warnings(material),
            sections_verdicts.attribution(material),
            sections_confounds.functional_rank(material),
            sections_confounds.confounds(material),
            sections_losses.losses(material),
            sections_keys.keys(material),
            sections_downstream.downstream(material),
            sections_losses.sweep(material),
            sections_verdicts.missing(material),
            sections_record.comparison(material),
            sections_record.deviations(material),
            sections_record.record(material),
        ),
    )
