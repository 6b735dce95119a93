"""The choice of a learning rate: on which losses, at which edge, with which sensitivity."""

import pathlib

import numpy as np
import pytest
import synthetic_study

from qkjax import errors, files
from qkjax.cli import config_flag
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan, sweep

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARM = "muon_qk"
INITIAL = synthetic_study.START[synthetic_study.LOSS]


def make_plan(factors=(0.25, 0.5, 1.0, 2.0, 4.0), **fields) -> plan.Plan:
    values = config_flag.load(ROOT / "configs" / "study.py", "pilot")
    values.sweep.factors = factors
    values.update_from_flattened_dict(fields)
    return plan.make_plan(values)


def write(study: plan.Plan, workdir: pathlib.Path, losses: dict[float, float | None]) -> None:
    """Finished sweep runs by rate; a loss of None is a run that diverged at step 10."""
    step = next(s for s in study.steps if s.kind == plan.SWEEP and s.arm == ARM)
    for rate, loss in losses.items():
        directory = workdir / sweep.directory_of(ARM, rate)
        synthetic_study.write_run(
            directory,
            study.run_config(step, rate).for_platform("cpu"),
            {
                synthetic_study.LOSS: 3.0 if loss is None else loss,
                synthetic_study.PR: 40.0,
                synthetic_study.PR_BEFORE: 30.0,
            },
            {synthetic_study.LOSS: 0.0, synthetic_study.PR: 0.0, synthetic_study.PR_BEFORE: 0.0},
            diverged_after=9 if loss is None else None,
        )


def halves(directory: pathlib.Path, first: float, second: float) -> None:
    """Gives the reported pass these losses on the two halves of the validation split."""
    count = np.full(16, 2048, np.float32)
    losses = np.repeat([first, second], 8).astype(np.float32)
    np.savez(directory / "validation" / "final.npz", loss_sum=losses * count, count=count)
    summary = RunDirectory(directory).read_summary()
    whole = float((losses * count).sum() / count.sum())
    RunDirectory(directory).write_summary({**summary, "val_final/loss": whole})


def test_the_lowest_final_loss_inside_the_grid_is_chosen(tmp_path):
    study = make_plan()
    grid = study.grid(ARM)
    write(study, tmp_path, dict(zip(grid, (3.6, 3.4, 3.3, 3.5, 3.9), strict=True)))
    entry = sweep.choose(study, tmp_path, ARM)
    assert entry["chosen"] == 0.012 and entry["edge"] is None and not entry["extended"]
    assert [run["learning_rate"] for run in entry["runs"]] == list(grid) == entry["grid"]
    assert [run["directory"] for run in entry["runs"]][1] == "sweep/muon_qk/lr_0.006"
    assert entry["fingerprint"] == study.step(f"sweep/{ARM}/choice").fingerprint
    recorded = files.read_object(tmp_path / "sweep" / "learning_rates.json", "")
    assert recorded == {ARM: entry} == sweep.recorded(tmp_path)


def test_the_first_half_of_the_validation_split_decides(tmp_path):
    study = make_plan((1.0, 2.0), **{"sweep.extend": False})
    low, high = study.grid(ARM)
    write(study, tmp_path, {low: 3.0, high: 3.0})
    halves(tmp_path / sweep.directory_of(ARM, low), 3.1, 2.0)
    halves(tmp_path / sweep.directory_of(ARM, high), 3.0, 4.0)
    entry = sweep.choose(study, tmp_path, ARM)
    assert entry["chosen"] == high
    assert [run["loss"] for run in entry["runs"]] == pytest.approx([3.1, 3.0])
    assert [run["loss_whole"] for run in entry["runs"]] == pytest.approx([2.55, 3.5])


def test_a_diverged_rate_is_shown_and_never_chosen(tmp_path):
    study = make_plan()
    grid = study.grid(ARM)
    write(study, tmp_path, dict(zip(grid, (3.6, 3.4, 3.3, 3.5, None), strict=True)))
    entry = sweep.choose(study, tmp_path, ARM)
    last = entry["runs"][-1]
    assert (last["diverged"], last["loss"], last["loss_whole"]) == (True, None, None)
    assert entry["chosen"] == grid[2] and not any(r["diverged"] for r in entry["runs"][:-1])


def test_sensitivity_is_the_mean_loss_above_the_best_with_initial_loss_as_ceiling(tmp_path):
    study = make_plan()
    grid = study.grid(ARM)
    losses = (3.6, 3.4, 3.3, INITIAL + 5, None)
    write(study, tmp_path, dict(zip(grid, losses, strict=True)))
    for rate, loss in zip(grid, losses, strict=True):
        if loss is not None:
            halves(tmp_path / sweep.directory_of(ARM, rate), loss, 9.0)
    entry = sweep.choose(study, tmp_path, ARM)
    initial = entry["loss_at_init"]
    assert initial == pytest.approx(INITIAL, abs=0.4)  # its first half
    expected = (3.6 + 3.4 + 3.3 + initial + initial) / 5 - 3.3
    assert entry["sensitivity"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("losses", "added", "loss", "chosen", "edge"),
    [
        ((3.3, 3.4, 3.5, 3.6, 3.7), 0.0015, 3.2, 0.0015, "low"),  # still at an edge: flagged
        ((3.3, 3.4, 3.5, 3.6, 3.7), 0.0015, 3.4, 0.003, None),
        ((3.7, 3.6, 3.5, 3.4, 3.3), 0.096, 3.2, 0.096, "high"),
        ((3.7, 3.6, 3.5, 3.4, 3.3), 0.096, None, 0.048, None),
    ],
)
def test_the_grid_is_extended_once_where_its_best_is_at_an_edge(
    losses, added, loss, chosen, edge, tmp_path
):
    study = make_plan()
    write(study, tmp_path, dict(zip(study.grid(ARM), losses, strict=True)))
    assert sweep.extension(study, tmp_path, ARM) == added
    write(study, tmp_path, {added: loss})
    entry = sweep.choose(study, tmp_path, ARM)
    assert (entry["chosen"], entry["edge"], entry["extended"]) == (chosen, edge, True)
    assert len(entry["runs"]) == 6 and len(entry["grid"]) == 5
    original = [run["loss"] for run in entry["runs"] if run["learning_rate"] != added]
    best = min(run["loss"] for run in entry["runs"] if run["loss"] is not None)
    assert entry["sensitivity"] == pytest.approx(np.mean(original) - best)


def test_without_extension_the_edge_is_flagged_all_the_same(tmp_path):
    study = make_plan((1.0, 2.0), **{"sweep.extend": False})
    low, high = study.grid(ARM)
    write(study, tmp_path, {low: 3.4, high: 3.3})
    entry = sweep.choose(study, tmp_path, ARM)
    assert (entry["chosen"], entry["edge"], entry["extended"]) == (high, "high", False)


def test_where_every_rate_diverged_nothing_is_chosen(tmp_path):
    study = make_plan((1.0, 2.0))
    write(study, tmp_path, dict.fromkeys(study.grid(ARM)))
    assert sweep.extension(study, tmp_path, ARM) is None
    with pytest.raises(errors.UsageError, match=r"every learning rate diverged \(0.012, 0.024\)"):
        sweep.choose(study, tmp_path, ARM)
    entry = sweep.recorded(tmp_path)[ARM]
    assert entry["chosen"] is None and entry["sensitivity"] is None
    assert all(run["diverged"] for run in entry["runs"])


def test_a_torn_record_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "learning_rates.json").write_text('{"muon_qk": {"chos')
    with pytest.raises(errors.UsageError, match=r"learning_rates.json: damaged .* Move it away"):
        sweep.recorded(tmp_path)
