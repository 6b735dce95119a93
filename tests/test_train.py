"""train_and_evaluate: the files of a run, exact repetition, resume to the bit, faults."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_run
import synthetic_study
from marks import with_long
from tensorboard.backend.event_processing import event_accumulator

from qkjax import errors, evaluation, flops, model, train
from qkjax.config import Config
from qkjax.data import pipeline
from qkjax.runs import checkpoint, signals, writers
from qkjax.runs import directory as run_directory
from qkjax.runs.directory import RunDirectory
from qkjax.trained import trained_run

ARMS = {
    "adamw_qk": ("adamw", "learned", "tiny"),
    "adamw_noqk_clip_original": ("adamw", "none", "tiny,original,clip"),
    "muon_qk_decayed": ("muon", "learned", "tiny,decayed"),
    "muon_noqk_accumulated": ("muon", "none", "tiny"),
}
CLIP = 0.1  # largest logits


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "fixed": small_run.make_dataset(folder / "fixed"),
        "original": small_run.make_dataset(folder / "original", end_of_text=False),
    }


def arm_config(datasets: dict[str, pathlib.Path], arm: str, **fields) -> Config:
    optimizer, qk_norm, words = ARMS[arm]
    if arm.endswith("accumulated"):
        fields["train__microbatch_sequences"] = 2
    if arm == "adamw_qk":  # 60 steps of 4 sequences: a second pass over the data
        fields["train__tokens"] = 60 * small_run.TOKENS_PER_STEP
    if "clip" in words:  # at first nothing is above it, at the end every head
        fields["optimizer__qk_clip"] = CLIP
    if "decayed" in words:  # tau 7.3 within 20 steps would turn gamma's sign
        fields["optimizer__gamma_decay_tau"] = 0.5
    dataset = datasets["original" if "original" in words else "fixed"]
    return small_run.make_config(dataset, optimizer, qk_norm, words, **fields)


@pytest.fixture(scope="module")
def finished(datasets, tmp_path_factory) -> tuple[Config, pathlib.Path, dict]:
    """One unbroken run with a final pass."""
    config = arm_config(datasets, "muon_noqk_accumulated", eval__final_tokens=0)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return config, workdir, train.train_and_evaluate(config, workdir)


def test_a_run_leaves_every_file_of_the_contract(finished):
    config, workdir, summary = finished
    rows = small_run.rows(workdir)
    assert [row["step"] for row in rows] == list(range(small_run.STEPS + 1))
    assert [row["tokens"] for row in rows] == [
        step * small_run.TOKENS_PER_STEP for step in range(small_run.STEPS + 1)
    ]
    assert "train/loss" not in rows[0]
    assert all(np.isfinite(row["train/loss"]) for row in rows[1:])
    evaluated = [row["step"] for row in rows if "val/loss" in row]
    assert evaluated == [0, 5, 9, 20]
    for row in rows:
        assert ("pr/key/post_rope/raw" in row) == (row["step"] in evaluated)
    for folder in ("spectra", "validation"):
        names = sorted(path.name for path in (workdir / folder).iterdir())
        assert names == ["final.npz", *(f"step_{step:08d}.npz" for step in evaluated)]
    for step in evaluated:
        name = f"step_{step:08d}.npz"
        with np.load(workdir / "validation" / name) as arrays:
            assert arrays["loss_sum"].shape == arrays["count"].shape == (7,)
            assert arrays["loss_sum"].dtype == np.float32
            loss = arrays["loss_sum"].sum(dtype=np.float64) / arrays["count"].sum()
            assert loss == pytest.approx(rows[step]["val/loss"], rel=1e-6)
        with np.load(workdir / "spectra" / name) as arrays:
            assert arrays["key_pre_rope_centred"].shape == (2, 1, 16)
            assert arrays["num_tokens"] == 7 * small_run.LENGTH
            sigma = arrays["key_post_rope_raw"].astype(np.float64)
            ratio = (sigma.sum(-1) ** 2 / (sigma**2).sum(-1)).mean()
            assert ratio == pytest.approx(rows[step]["pr/key/post_rope/raw"], rel=1e-5)
    assert RunDirectory(workdir).read_summary() == summary
    listed = set(json.loads((workdir / "summary.json").read_text())["files"])
    arrays = {str(path.relative_to(workdir)) for path in workdir.glob("*/*.npz")}
    assert listed == {"config.json", "environment.json", "metrics.jsonl", *arrays}
    assert summary["step"] == small_run.STEPS and summary["diverged"] is False
    assert summary["val/loss"] == rows[-1]["val/loss"]
    assert summary["val_final/loss"] == pytest.approx(summary["val/loss"], rel=1e-6)
    assert summary["pr_final/key/post_rope/raw"] == summary["pr/key/post_rope/raw"]
    assert summary["pr/undefined_heads"] == rows[0]["pr/undefined_heads"] == 0
    assert "pr_final/key/post_rope/raw" not in rows[-1]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3
    assert json.loads((workdir / "config.json").read_text())["arm"] == config.arm
    assert "blocks/attention/key/kernel" in (workdir / "parameters.txt").read_text()
    assert json.loads((workdir / "environment.json").read_text())["dataset_fingerprint"]


def test_orbax_restores_the_parameters_without_our_code(finished):
    config, workdir, _ = finished
    path = workdir / "checkpoints" / str(small_run.STEPS) / "params"
    restored = ocp.StandardCheckpointer().restore(path.absolute())
    shapes = model.parameter_shapes(config.for_platform("cpu").model)
    assert jax.tree.structure(restored) == jax.tree.structure(shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(restored)) == flops.num_parameters(
        config.for_platform("cpu").model
    )


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    config, workdir, summary = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert train.train_and_evaluate(config, workdir) == summary
    assert "already complete at step 20" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"run.lock"}


@pytest.mark.parametrize("arm", with_long(ARMS, {"adamw_qk"}))
@pytest.mark.usefixtures("programs_built_once")
def test_any_number_of_stops_ends_in_the_same_bits(datasets, arm, tmp_path, monkeypatch):
    config = arm_config(datasets, arm)
    last = config.train.num_steps
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    expected = train.train_and_evaluate(config, unbroken)
    chosen = random.Random(arm).sample(range(last), 2)
    if arm == "muon_qk_decayed":  # before the first update, at an evaluation, at a checkpoint
        chosen = [0, 5, 6]
    found = small_run.run_with_signals(config, broken, monkeypatch, sorted(chosen))
    assert_same_run(unbroken, broken, last)
    assert found["params_sha256"] == expected["params_sha256"]
    if arm == "adamw_qk":
        assert small_run.rows(broken)[-1]["train/epoch"] == 1
        assert found["epochs"] == 1.5
    if "clip" in arm:  # it acts, on some heads, on both sides of a stop
        clipped = [row["train/clipped_heads"] for row in small_run.rows(broken)[1:]]
        assert 0 in clipped and any(0 < heads < 4 for heads in clipped), clipped
        assert any(clipped[: min(chosen)]) and any(clipped[max(chosen) + 1 :]), (chosen, clipped)


def assert_same_run(unbroken: pathlib.Path, broken: pathlib.Path, last: int) -> None:
    """Equal digests of the last checkpoint, equal rows but for perf/*, equal arrays."""
    assert small_run.identity(broken, last) == small_run.identity(unbroken, last)
    assert small_run.rows(broken) == small_run.rows(unbroken)
    for path in sorted(unbroken.glob("spectra/*.npz")) + sorted(unbroken.glob("validation/*.npz")):
        assert path.read_bytes() == (broken / path.relative_to(unbroken)).read_bytes()


@pytest.mark.usefixtures("programs_built_once")
def test_a_stop_during_an_evaluation_is_made_up_for(datasets, finished, tmp_path, monkeypatch):
    config, unbroken, _ = finished
    original, passes = evaluation.Evaluator.__call__, []

    def stop_in_third_pass(self, params, batches, interrupted):
        passes.append(None)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, params, batches, interrupted)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluator, "__call__", stop_in_third_pass)
        with pytest.raises(signals.Stopped, match="after step 9"):
            train.train_and_evaluate(config, tmp_path / "run")
    assert "val/loss" not in small_run.rows(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "checkpoints" / "9").is_dir()
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_run(unbroken, tmp_path / "run", small_run.STEPS)


@pytest.mark.usefixtures("programs_built_once")
def test_a_stop_during_a_save_ends_in_the_same_bits(datasets, finished, tmp_path, monkeypatch):
    config, workdir, _ = finished
    save = checkpoint.Checkpoints.save

    def stopped_in_it(self, step, *arguments):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", stopped_in_it)
        with pytest.raises(signals.Stopped) as caught:
            train.train_and_evaluate(config, tmp_path / "run")
    assert caught.value.exit_code == 143
    assert checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps()[-1] == 6
    train.train_and_evaluate(config, tmp_path / "run")
    assert small_run.identity(tmp_path / "run") == small_run.identity(workdir)


@pytest.mark.usefixtures("programs_built_once")
def test_a_crash_goes_on_from_the_checkpoint_before(datasets, finished, tmp_path, monkeypatch):
    config, unbroken, _ = finished
    original = pipeline.TrainLoader.__next__

    def fail(loader: pipeline.TrainLoader) -> pipeline.Batch:
        if loader.step == 16:
            raise RuntimeError("a broken disk")
        return original(loader)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainLoader, "__next__", fail)
        with pytest.raises(RuntimeError, match="a broken disk"):
            train.train_and_evaluate(config, tmp_path / "run")
    assert small_run.rows(tmp_path / "run")[-1]["step"] > 12
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_run(unbroken, tmp_path / "run", small_run.STEPS)


@pytest.mark.usefixtures("programs_built_once")
def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_goes_on(finished, tmp_path):
    config, unbroken, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    (workdir / "summary.json").unlink()
    data = max((workdir / "checkpoints" / "20" / "params").rglob("d/*"), key=os.path.getsize)
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    data.write_bytes(damaged)
    with pytest.raises(errors.UsageError, match=r"checkpoints/20.*--restore_step=18"):
        train.train_and_evaluate(config, workdir)
    with pytest.raises(errors.UsageError, match=r"no checkpoint of step 7.*\[0, 18, 20\]"):
        train.train_and_evaluate(config, workdir, restore_step=7)
    train.train_and_evaluate(config, workdir, restore_step=18)
    assert_same_run(unbroken, workdir, small_run.STEPS)
    assert list((workdir / "checkpoints").glob("set-aside-20-*"))


def test_rows_are_on_disk_before_their_checkpoint(datasets, tmp_path, monkeypatch):
    calls = []

    def log(name, original):
        def logged(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        return logged

    for name, owner, method in (
        ("write", writers.CompositeWriter, "write_row"),
        ("flush", writers.CompositeWriter, "flush"),
        ("save", checkpoint.Checkpoints, "save"),
    ):
        monkeypatch.setattr(owner, method, log(name, getattr(owner, method)))
    train.train_and_evaluate(arm_config(datasets, "muon_noqk_accumulated"), tmp_path / "run")
    saves = [number for number, call in enumerate(calls) if call == "save"]
    assert len(saves) == 5
    assert all(calls[number - 2 : number] == ["write", "flush"] for number in saves)


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(datasets, tmp_path, monkeypatch):
    config = arm_config(datasets, "muon_noqk_accumulated")
    state = 4 * flops.num_parameters(config.for_platform("cpu").model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * state))
    with pytest.raises(errors.StorageError, match=r"checkpoints need .* GB are free"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_was_set_aside_frees_no_room(datasets, tmp_path, monkeypatch):
    config = arm_config(datasets, "muon_noqk_accumulated")
    state = 8 * flops.num_parameters(config.for_platform("cpu").model)
    aside = tmp_path / "run" / "checkpoints" / "set-aside-6-1" / "params"
    aside.mkdir(parents=True)
    (aside / "data").write_bytes(bytes(10 * state))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * state))
    with pytest.raises(errors.StorageError, match="of which 0 GB are there"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_a_scale_for_accelerators_says_that_it_is_on_a_cpu(datasets, tmp_path, caplog):
    for words, told in (("tiny", 0), ("pilot", 1)):
        config = small_run.make_config(
            datasets["fixed"],
            words=words,
            train__tokens=small_run.TOKENS_PER_STEP,
            eval__at_tokens=(),
            eval__final_tokens=-1,
        )
        train.train_and_evaluate(config, tmp_path / words)
        assert caplog.text.count(f"so this {words} run trains on the CPU") == told


def test_memory_that_does_not_hold_the_step_gets_advice(datasets, tmp_path, monkeypatch):
    def full(self, params, batches, interrupted):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(evaluation.Evaluator, "__call__", full)
    with pytest.raises(errors.OutOfMemoryError, match="microbatch_sequences") as error:
        train.train_and_evaluate(arm_config(datasets, "adamw_qk"), tmp_path / "run")
    assert error.value.exit_code == 1
    assert "Parameters and optimiser state alone take 0.000" in str(error.value)  # GB


def test_rates_leave_the_compilation_out_and_the_loader_is_closed(datasets, tmp_path, monkeypatch):
    calls = []

    def log(owner, method):
        original = getattr(owner, method)

        def logged(*arguments, **options):
            calls.append(method)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, method, logged)

    log(train.resources, "compile_step")
    log(train.progress.Progress, "restart_clock")
    log(train.progress.Progress, "rates")
    log(pipeline.TrainLoader, "close")
    train.train_and_evaluate(arm_config(datasets, "muon_noqk_accumulated"), tmp_path / "run")
    assert calls[:4] == ["restart_clock", "compile_step", "restart_clock", "rates"]
    assert calls.count("close") == 1


def test_a_spike_is_said_and_training_goes_on(datasets, tmp_path, monkeypatch, caplog):
    """One update at 5,000 times its rate; said again, and no row differs, after a resume."""
    config = arm_config(datasets, "adamw_qk")
    original = train.optimizer.learning_rate

    def too_high_once(schedule, peak):
        rate = original(schedule, peak)
        return lambda step: jnp.where(step == 40, 5000, 1) * rate(step)

    monkeypatch.setattr(train.optimizer, "learning_rate", too_high_once)
    said = []
    for name, stops in (("run", ()), ("stopped", (40,))):
        caplog.clear()
        small_run.run_with_signals(config, tmp_path / name, monkeypatch, stops)
        texts = [record.getMessage() for record in caplog.records]
        said.append([text for text in texts if "is a spike" in text])
    assert said[0] == said[1]
    assert said[0][0].startswith("step 42: the training loss ")
    assert_same_run(tmp_path / "run", tmp_path / "stopped", 60)


@pytest.mark.usefixtures("programs_built_once")
def test_lost_rows_do_not_put_an_evaluation_into_another_step(finished, tmp_path):
    config, unbroken, _ = finished
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    (workdir / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:8]))  # steps 0 to 7
    found = train.train_and_evaluate(config, workdir)
    rows, whole = small_run.rows(workdir), small_run.rows(unbroken)
    assert rows[:8] == whole[:8]
    (last,) = rows[8:]
    assert last["step"] == 20 and last["tokens"] == whole[20]["tokens"]
    assert last["val/loss"] == whole[20]["val/loss"] == found["val/loss"]


@pytest.mark.usefixtures("programs_built_once")
def test_arrays_of_the_steps_that_are_done_again_are_gone(datasets, finished, tmp_path):
    _, unbroken, _ = finished
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    fewer = arm_config(
        datasets, "muon_noqk_accumulated", eval__at_tokens=(5 * small_run.TOKENS_PER_STEP,)
    )
    train.train_and_evaluate(
        fewer, workdir, restore_step=0, allow_config_change=("eval.steps", "eval.final_tokens")
    )
    for folder in ("spectra", "validation"):
        steps = sorted(path.name for path in (workdir / folder).iterdir())
        assert steps == [f"step_{step:08d}.npz" for step in (0, 5, 20)]


@pytest.mark.usefixtures("programs_built_once")
def test_tensorboard_reads_every_scalar_of_a_stopped_run(datasets, tmp_path, monkeypatch):
    config = arm_config(datasets, "muon_noqk_accumulated")
    workdir = tmp_path / "run"
    small_run.run_with_signals(config, workdir, monkeypatch, (5, 11))
    events = event_accumulator.EventAccumulator(
        str(workdir), size_guidance={"scalars": 0, "images": 0}
    )
    events.Reload()
    found = {
        (event.step, tag): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
        if np.isfinite(event.value)  # one kv head has no overlap: null there, NaN here
    }
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (row["step"], tag): value
        for row in rows
        for tag, value in row.items()
        if tag != "step" and value is not None
    }
    assert found.keys() == expected.keys()
    evaluated = [row["step"] for row in rows if "val/loss" in row]
    images = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert images == {
        f"spectra/{name}": evaluated
        for name in (
            "key/pre_rope/centred",
            "key/post_rope/raw",
            "query/pre_rope/centred",
            "query/post_rope/raw",
        )
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.usefixtures("programs_built_once")
def test_a_longer_budget_may_be_allowed(datasets, finished, tmp_path):
    _, unbroken, _ = finished
    shutil.copytree(unbroken, tmp_path / "run")
    longer = arm_config(
        datasets,
        "muon_noqk_accumulated",
        eval__final_tokens=0,
        train__tokens=24 * small_run.TOKENS_PER_STEP,
    )
    with pytest.raises(errors.UsageError) as refused:
        train.train_and_evaluate(longer, tmp_path / "run")
    fields = re.search(r"--allow_config_change=(\S+)", str(refused.value))
    allowed = tuple(fields[1].rstrip(".").split(","))
    assert "train.tokens" in allowed
    summary = train.train_and_evaluate(longer, tmp_path / "run", allow_config_change=allowed)
    assert summary["step"] == 24
    assert (tmp_path / "run" / "summary.step_20.json").exists()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    changed = {change["field"] for change in environment["allowed_config_changes"]}
    assert changed == set(allowed)


@pytest.mark.usefixtures("programs_built_once")
def test_other_numerics_are_refused_and_may_be_allowed(finished, tmp_path):
    """Recorded by this version, and by those that recorded none."""
    config, unbroken, summary = finished
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    newer = dataclasses.replace(config, numerics_version=config.numerics_version + 1)
    with pytest.raises(errors.UsageError, match=r"numerics_version: old \d+, new \d+\."):
        train.train_and_evaluate(newer, workdir, restore_step=18)
    found = train.train_and_evaluate(
        newer, workdir, restore_step=18, allow_config_change=("numerics_version",)
    )
    assert found["params_sha256"] == summary["params_sha256"]
    environment = json.loads((workdir / "environment.json").read_text())
    [change] = environment["allowed_config_changes"]
    versions = (config.numerics_version, newer.numerics_version)
    assert (change["field"], change["old"], change["new"]) == ("numerics_version", *versions)
    stored = json.loads((unbroken / "config.json").read_text())
    del stored["numerics_version"]
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(errors.UsageError, match=rf"numerics_version: old 1, new {versions[1]}\."):
        train.train_and_evaluate(newer, workdir, restore_step=18)


def everything(workdir: pathlib.Path) -> dict[str, bytes]:
    """Every file that a start may write, but for the lock."""
    names = [path for path in workdir.iterdir() if path.is_file() and path.name != "run.lock"]
    return {path.name: path.read_bytes() for path in names}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (  # refused by nobody, and nothing is left to train with it
            {"optimizer__learning_rate": 1.0},
            "optimizer.learning_rate",
            r"run: ended at step 20, nothing is left to train with another "
            r"optimizer\.learning_rate\. Use another --workdir",
        ),
        ({"seed": 7}, "seed", "no checkpoint can resume with another seed"),
        ({"model__d_ff": 64}, "model.d_ff", r"no checkpoint can resume with another model\.d_ff"),
        # Only the checkpoint knows that its optimiser state has another tree.
        (
            {"optimizer__clip_norm": 0.0, "train__tokens": 24 * small_run.TOKENS_PER_STEP},
            "all",
            "in the checkpoint and .* in this config",
        ),
    ],
)
def test_a_change_that_cannot_be_used_leaves_the_record_as_it_was(
    datasets, finished, tmp_path, fields, field, message
):
    config, unbroken, _ = finished
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    changed = arm_config(datasets, "muon_noqk_accumulated", eval__final_tokens=0, **fields)
    names = tuple(run_directory.flatten(config.to_dict())) if field == "all" else (field,)
    before = everything(workdir)
    with pytest.raises(errors.UsageError, match=message):
        train.train_and_evaluate(changed, workdir, allow_config_change=names)
    assert everything(workdir) == before
    assert train.train_and_evaluate(config, workdir)["step"] == small_run.STEPS


@pytest.mark.usefixtures("programs_built_once")
def test_a_finished_run_goes_back_where_it_is_told_to(finished, tmp_path, capsys):
    config, unbroken, summary = finished
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    before = everything(workdir)
    with pytest.raises(errors.UsageError, match=r"no checkpoint of step 7.*\[0, 18, 20\]"):
        train.train_and_evaluate(config, workdir, restore_step=7)
    assert everything(workdir) == before
    for again in (1, 2):
        capsys.readouterr()
        found = train.train_and_evaluate(config, workdir, restore_step=18)
        assert found["params_sha256"] == summary["params_sha256"]
        printed = capsys.readouterr().out
        assert "resumed after step 18" in printed
        assert f"set aside  set-aside-20-{again} in" in printed
        assert "leave --restore_step out of the next command" in printed
        assert (workdir / "checkpoints" / f"set-aside-20-{again}").is_dir()
    assert_same_run(unbroken, workdir, small_run.STEPS)
    train.train_and_evaluate(config, workdir)
    assert "already complete at step 20" in capsys.readouterr().out


def test_seeds_differ_in_initial_values_and_in_data_order(datasets, finished, tmp_path):
    _, workdir, _ = finished
    config = arm_config(datasets, "muon_noqk_accumulated", seed=43, eval__final_tokens=-1)
    train.train_and_evaluate(config, tmp_path / "run")
    ours, theirs = small_run.rows(tmp_path / "run"), small_run.rows(workdir)
    assert ours[0]["val/loss"] != theirs[0]["val/loss"]
    assert ours[1]["train/loss"] != theirs[1]["train/loss"]


@pytest.mark.usefixtures("programs_built_once")
def test_a_killed_final_pass_is_made_up_for_alone(datasets, finished, tmp_path, monkeypatch):
    config, unbroken, expected = finished
    original, calls = evaluation.Evaluator.__call__, []

    def fail_in_final_pass(self, params, batches, interrupted):
        calls.append(None)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return original(self, params, batches, interrupted)

    monkeypatch.setattr(evaluation.Evaluator, "__call__", fail_in_final_pass)
    with pytest.raises(RuntimeError, match="killed"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    found = train.train_and_evaluate(config, tmp_path / "run")
    assert len(calls) == 6
    for name in ("params_sha256", "val_final/loss", "val/loss"):
        assert found[name] == expected[name]
    assert small_run.rows(tmp_path / "run") == small_run.rows(unbroken)


def test_divergence_is_recorded_and_stays(datasets, tmp_path, capsys):
    config = arm_config(datasets, "adamw_qk", optimizer__learning_rate=1e30)
    with pytest.raises(errors.NonFiniteError) as first:
        train.train_and_evaluate(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diverged"] is True
    bad = summary["diverged_step"]
    assert summary["step"] == bad - 1
    assert f"step {bad}" in str(first.value) and "training records" in str(first.value)
    assert "gradient of" in str(first.value) or "the loss" in str(first.value)
    rows = small_run.rows(tmp_path / "run")
    assert rows[-1]["step"] == bad and rows[-1]["train/grad_norm"] is None
    kept = small_run.identity(tmp_path / "run", bad - 1)
    assert kept[0] == summary["params_sha256"]
    with pytest.raises(errors.NonFiniteError, match=f"diverged at step {bad}"):
        train.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.process
@pytest.mark.usefixtures("programs_built_once")
def test_a_disk_that_fills_up_at_a_checkpoint_is_one_error_and_the_run_resumes(datasets, tmp_path):
    """The disk is large enough by the estimate at the start, and then is not."""
    config = arm_config(datasets, "muon_noqk_accumulated")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (it takes root)")
    try:
        with pytest.raises(errors.StorageError, match="Make room") as caught:
            train.train_and_evaluate(config, place / "run")
        assert caught.value.exit_code == 4
        kept = checkpoint.Checkpoints(place / "run" / "checkpoints", read_only=True).steps()
        assert kept and max(kept) < small_run.STEPS
        remount = ["mount", "-o", "remount,size=20m", str(place)]
        subprocess.run(remount, check=True)
        assert train.train_and_evaluate(config, place / "run")["step"] == small_run.STEPS
        unbroken = train.train_and_evaluate(config, tmp_path / "unbroken")
        resumed = json.loads((place / "run" / "summary.json").read_text())
        assert resumed["params_sha256"] == unbroken["params_sha256"]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.usefixtures("programs_built_once")
def test_a_checkpoint_of_another_run_is_refused_by_every_reader(datasets, finished, tmp_path):
    """Copied over, or behind a config.json that was lost or edited."""
    config, workdir, _ = finished
    faster = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1)
    )
    train.train_and_evaluate(faster, tmp_path / "faster")

    def copy(name: str) -> pathlib.Path:
        shutil.copytree(workdir, tmp_path / name, ignore=shutil.ignore_patterns("summary.json"))
        return tmp_path / name

    swapped = copy("swapped")
    shutil.rmtree(swapped / "checkpoints")
    shutil.copytree(tmp_path / "faster" / "checkpoints", swapped / "checkpoints")
    message = r"of another run.*: optimizer\.learning_rate: checkpoint 0\.1, here 0\.012\. "
    with pytest.raises(errors.UsageError, match=message):
        train.train_and_evaluate(config, swapped)
    with pytest.raises(errors.UsageError, match=message):
        trained_run.open_run(swapped, finished=False)
    shutil.copy(workdir / "summary.json", swapped)  # a finished run, nothing left to train
    with pytest.raises(errors.UsageError, match=message):
        train.train_and_evaluate(config, swapped)

    lost = copy("lost")
    (lost / "config.json").unlink()
    with pytest.raises(errors.UsageError, match=r"learning_rate: checkpoint 0\.012, here 0\.1\."):
        train.train_and_evaluate(faster, lost)

    edited = copy("edited")
    for field, value in (("rope_base", 9e3), ("norm_eps", 1e-5)):
        values = json.loads((workdir / "config.json").read_text())
        values["model"][field] = value
        (edited / "config.json").write_text(json.dumps(values))
        with pytest.raises(errors.UsageError, match=rf"of another run.*model\.{field}"):
            trained_run.open_run(edited, finished=False)

    summary = json.loads((workdir / "summary.json").read_text())
    (copy("other") / "summary.json").write_text(json.dumps({**summary, "params_sha256": "0" * 64}))
    synthetic_study.seal(tmp_path / "other")
    with pytest.raises(errors.UsageError, match=r"summary\.json: params_sha256 is 000000000000"):
        trained_run.open_run(tmp_path / "other")
    assert trained_run.open_run(workdir).params_sha256 == summary["params_sha256"]


def test_a_changed_config_or_dataset_is_refused(datasets, tmp_path):
    config = arm_config(datasets, "muon_noqk_accumulated")
    train.train_and_evaluate(config, tmp_path / "run")
    other = dataclasses.replace(config, seed=7)
    with pytest.raises(errors.UsageError, match="seed: old 42, new 7"):
        train.train_and_evaluate(other, tmp_path / "run")
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    assert train.train_and_evaluate(config, moved)["step"] == small_run.STEPS
    swapped = small_run.make_dataset(tmp_path / "swapped", seed=1)
    data = dataclasses.replace(config.data, dir=str(swapped))
    with pytest.raises(errors.UsageError, match="dataset"):
        train.train_and_evaluate(dataclasses.replace(config, data=data), moved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__vocab_size": 301}, "vocab_size is 300.*model.vocab_size is 301"),
        ({"model__sequence_length": 64}, "sequence_length is 32.*64"),
        ({"train__tokens": 5_000 * 128}, "passes over.*max_epochs"),
        ({"data__end_of_text": False}, "end_of_text is True.*False"),
        ({"train__microbatch_sequences": 3}, "microbatch_sequences: 3 does not divide the 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(datasets, tmp_path, fields, message):
    config = small_run.make_config(datasets["fixed"], **fields)
    with pytest.raises(errors.UsageError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("asked", "wanted"), [("", True), ("true", False), ("false", True)])
def test_a_gpu_whose_compiler_was_asked_otherwise_is_refused(monkeypatch, tmp_path, asked, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", asked and f"--a=1 --xla_gpu_deterministic_ops={asked}")
    config = small_run.make_config(tmp_path / "none", determinism__gpu=wanted)
    with pytest.raises(errors.UsageError, match=rf"^determinism\.gpu: {str(wanted).lower()}, but"):
        train.train_and_evaluate(config, tmp_path / "run")
