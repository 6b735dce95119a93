"""Rank surgery: projected keys against plain numpy, full rank, planted ranks, files, refusals."""

import csv
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import random_run
import reference_model
import small_run
import synthetic_study

from qkjax import config as config_lib
from qkjax import errors, model, train
from qkjax.data import manifest as manifest_lib
from qkjax.data import pipeline
from qkjax.runs import checkpoint
from qkjax.runs.directory import RunDirectory
from qkjax.trained import rank_curves, rank_surgery

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD_DIM, STEPS = 16, 300
RANKS = (1, 4, HEAD_DIM)
Case = tuple[pathlib.Path, config_lib.Config]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run that has learned enough for its keys to matter: two kv heads, 300 steps."""
    directory = tmp_path_factory.mktemp("rank_surgery")
    dataset = small_run.make_dataset(directory / "dataset")
    run_config = small_run.make_config(
        dataset,
        "muon",
        "learned",
        model__num_kv_heads=2,
        train__tokens=STEPS * small_run.TOKENS_PER_STEP,
        checkpoint__every_tokens=STEPS * small_run.TOKENS_PER_STEP,
        eval__at_tokens=(),
        data__max_epochs=10,
        eval__batch_sequences=4,  # two batches, the last with a padded row
    )
    train.train_and_evaluate(run_config, directory / "run")
    return directory / "run", RunDirectory(directory / "run").read_config()


@pytest.fixture(scope="module")
def measured(case: Case) -> dict[str, list[rank_curves.Row]]:
    """Both stages, every layer, every file."""
    requests = {
        stage: rank_surgery.Request(ranks=RANKS, stage=stage) for stage in rank_surgery.STAGES
    }
    return {stage: measure(case[0], request) for stage, request in requests.items()}


def measure(workdir: pathlib.Path, request: rank_surgery.Request) -> list[rank_curves.Row]:
    return rank_surgery.measure(workdir, request, report=lambda line: None).rows


def only(rows: list[rank_curves.Row], layer: str, kind: str, rank: int) -> rank_curves.Row:
    (row,) = [row for row in rows if (row.layer, row.kind, row.rank) == (layer, kind, rank)]
    return row


def copied(case: Case, directory: pathlib.Path, params: model.Params | None = None) -> pathlib.Path:
    """The run elsewhere, without results; with `params` as its only checkpoint, of step 3."""
    shutil.copytree(case[0], directory, ignore=shutil.ignore_patterns("rank_surgery"))
    if params is not None:
        random_run.save_again(directory, 3, params)
    return directory


def restore(case: Case) -> model.Params:
    workdir, run_config = case
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    return checkpoints.restore_params(STEPS, model.parameter_shapes(run_config.model))


def validation_records(run_config: config_lib.Config) -> np.ndarray:
    """int [7, T+1]."""
    (batch,) = pipeline.read_validation(
        run_config.data.dir,
        manifest_lib.load(run_config.data.dir),
        num_tokens=0,
        sequences_per_batch=7,
    )
    return batch.tokens


# --------------------------------------------------------------------------------------------
# What is computed.


class Reference:
    """The decoder in numpy, float64, whose keys pass through a function of ours."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), restore(case))
        self.config = case[1].model
        self.records = validation_records(case[1])
        self.monkeypatch = monkeypatch

    def loss(self, change_keys) -> float:
        """Mean loss; change_keys(layer, stage, key [T, G, K]) returns the keys to use instead.

        The reference calls `rotate` H times for the queries of a layer, after G times for keys.
        """
        c, original = self.config, reference_model.rotate
        calls = 0

        def rotate(x_TK, base):
            nonlocal calls
            layer, head = divmod(calls, c.num_kv_heads + c.num_heads)
            calls += 1
            if head >= c.num_kv_heads:  # a query
                return original(x_TK, base)
            x_TK = change_keys(layer, head, "pre_rope", x_TK)
            return change_keys(layer, head, "post_rope", original(x_TK, base))

        total = 0.0
        with self.monkeypatch.context() as patch:
            patch.setattr(reference_model, "rotate", rotate)
            for record in self.records:
                calls = 0
                logits, _ = reference_model.logits(self.params, record[:-1], c)
                shifted = logits - logits.max(-1, keepdims=True)
                log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
                total -= log_p[np.arange(len(log_p)), record[1:]].sum()
        return total / (len(self.records) * c.sequence_length)

    def keys(self, stage: str) -> dict[tuple[int, int], np.ndarray]:
        """(layer, head) -> [n, K], all keys of the stage."""
        keys: dict[tuple[int, int], list[np.ndarray]] = {}

        def collect(layer, head, now, key_TK):
            if now == stage:
                keys.setdefault((layer, head), []).append(key_TK)
            return key_TK

        self.loss(collect)
        return {place: np.concatenate(parts) for place, parts in keys.items()}


Directions = dict[tuple[int, int], np.ndarray]


def top(keys: Directions) -> Directions:
    """[K, K], rows are right singular vectors."""
    return {place: np.linalg.svd(rows, full_matrices=False)[2] for place, rows in keys.items()}


@pytest.mark.parametrize("stage", list(rank_surgery.STAGES))
def test_equals_numpy_with_its_own_directions(case, measured, stage, monkeypatch):
    reference = Reference(case, monkeypatch)
    directions_of = top(reference.keys(stage))
    for layer in ("all", "1"):

        def project(at_layer, head, now, key_TK, layer=layer):
            if now != stage or layer not in ("all", str(at_layer)):
                return key_TK
            directions = directions_of[at_layer, head][:4]
            return key_TK @ directions.T @ directions

        expected = reference.loss(project)
        assert only(measured[stage], layer, "top", 4).val_loss == pytest.approx(expected, abs=2e-5)


def test_full_rank_changes_nothing(case, measured):
    """In float32 the projector is the identity to 1e-7, and so is the loss."""
    val_loss = RunDirectory(case[0]).read_summary()["val/loss"]
    for rows in measured.values():
        full = [row for row in rows if row.rank == HEAD_DIM]
        assert len(full) == 2 * 3  # kinds x (all, 0, 1)
        for row in full:
            assert row.val_loss == pytest.approx(val_loss, abs=1e-5)
            assert abs(row.delta) < 1e-5


def test_top_directions_are_never_worse_than_random_ones(measured):
    """By energy they are the best; by loss one of 16 may be as bad as another after RoPE."""
    for rows in measured.values():
        for layer in ("all", "0", "1"):
            for rank in (1, 4):
                top, random = (only(rows, layer, kind, rank).delta for kind in rank_curves.KINDS)
                assert top < random + rank_curves.TOLERANCE, (layer, rank)
    for rank in (1, 4):
        top, random = (
            only(measured["pre_rope"], "all", kind, rank).delta for kind in rank_curves.KINDS
        )
        assert top < random - 0.1, rank


def test_the_stages_differ(measured):
    """Keys after RoPE turn with the position: one direction holds less of them."""
    before, after = (only(measured[stage], "all", "top", 1) for stage in rank_surgery.STAGES)
    assert after.delta > before.delta + 0.02


def test_seeds_give_other_random_directions_and_the_same_top_ones(case, measured, tmp_path):
    request = rank_surgery.Request(ranks=(4,), layers=("all",), seed=1, tokens=0)
    rows = measure(copied(case, tmp_path / "run"), request)
    old = measured["pre_rope"]
    assert only(rows, "all", "top", 4).val_loss == only(old, "all", "top", 4).val_loss
    assert only(rows, "all", "random", 4).val_loss != only(old, "all", "random", 4).val_loss
    assert [row.seed for row in rows] == [None, 1]


# --------------------------------------------------------------------------------------------
# A planted rank.


def test_a_planted_rank_is_found(case, tmp_path):
    """Key kernels of rank 4 a head: 4 directions lose nothing before RoPE, which spreads them."""
    params = restore(case)
    kernel_NDX = params["blocks"]["attention"]["key"]["kernel"]
    heads = case[1].model.num_kv_heads
    basis = np.linalg.qr(np.random.default_rng(5).standard_normal((heads, HEAD_DIM, 4)))[0]
    kernel = kernel_NDX.reshape(*kernel_NDX.shape[:2], heads, HEAD_DIM)
    planted = np.einsum("ndgk,gkr,gjr->ndgj", kernel, basis, basis)
    params["blocks"]["attention"]["key"]["kernel"] = planted.reshape(kernel_NDX.shape).astype(
        np.float32
    )
    copy = copied(case, tmp_path / "run", params)
    losses = {}
    for stage in rank_surgery.STAGES:
        request = rank_surgery.Request(ranks=(1, 4), layers=("all",), stage=stage)
        losses[stage] = measure(copy, request)
    assert abs(only(losses["pre_rope"], "all", "top", 4).delta) < 1e-5
    assert only(losses["pre_rope"], "all", "top", 1).delta > 0.01
    assert only(losses["pre_rope"], "all", "random", 4).delta > 0.01
    assert only(losses["post_rope"], "all", "top", 4).delta > 1e-3
    assert rank_curves.dimensions_used(losses["pre_rope"]) == 4
    assert sorted(path.name for path in (copy / "rank_surgery").iterdir()) == [
        f"step_00000003{stage}.csv" for stage in ("", "_post_rope")
    ]


def test_projections_keep_what_they_should():
    directions = rank_surgery.random_directions((3, 2, 8, 8), seed=0)
    together = rank_surgery.projection(directions, 3, "all")
    np.testing.assert_allclose(together @ together, together, atol=1e-6)
    np.testing.assert_allclose(np.trace(together, axis1=-2, axis2=-1), 3, atol=1e-6)
    alone = rank_surgery.projection(directions, 3, "1")
    np.testing.assert_array_equal(alone[1], together[1])
    np.testing.assert_array_equal(alone[[0, 2]], np.broadcast_to(np.eye(8), (2, 2, 8, 8)))


# --------------------------------------------------------------------------------------------
# What is written and said.


def row(rank: int, delta: float, layer: str = "all", kind: str = "top") -> rank_curves.Row:
    return rank_curves.Row(
        layer, "pre_rope", "raw", kind, rank, None, 100, "d" * 64, 2.0 + delta, delta
    )


def test_the_answer_is_the_smallest_rank_within_a_hundredth_of_a_nat():
    rows = [row(2, 0.4), row(4, 0.0101), row(8, 0.01), row(16, -0.02)]
    rows += [row(1, 0.0, kind="random"), row(1, 0.0, layer="0")]
    assert rank_curves.dimensions_used(rows) == 8
    assert rank_curves.answer(rows, 16) == (
        "dimensions used, to within 0.01 nat: 8 of 16 (rank 4 loses 0.0101 nat)"
    )
    assert rank_curves.dimensions_used(rows[:2]) is None
    assert "or fewer (no smaller rank" in rank_curves.answer(rows[2:], 16)
    assert "more than 4 of 16" in rank_curves.answer(rows[:2], 16)
    assert "--layers=all" in rank_curves.answer(rows[4:], 16)


def test_csv_has_every_setting_once(case, measured):
    for stage, suffix in (("pre_rope", ""), ("post_rope", "_post_rope")):
        path = case[0] / "rank_surgery" / f"step_00000300{suffix}.csv"
        with path.open() as file:
            found = list(csv.DictReader(file))
        columns = ["layer", "stage", "kind", "rank", "seed"]
        assert list(found[0]) == [*rank_curves.Row._fields, "table_sha256"]
        expected = [
            (layer, stage, kind, str(rank), "0" if kind == "random" else "")
            for layer in ("all", "0", "1")
            for kind in ("top", "random")
            for rank in RANKS
        ]
        assert [tuple(line[name] for name in columns) for line in found] == expected
        for line, row in zip(found, measured[stage], strict=True):
            assert float(line["val_loss"]) == pytest.approx(row.val_loss, rel=1e-8)
            assert float(line["delta"]) == pytest.approx(row.delta, rel=1e-5)
        read = rank_curves.read_csv(path)
        digits = {"val_loss": 0.0, "delta": 0.0}
        assert [row._replace(**digits) for row in read] == [
            row._replace(**digits) for row in measured[stage]
        ]


# --------------------------------------------------------------------------------------------
# The command.


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/rank_surgery.py", *flags], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.process
def test_command_answers_from_a_moved_dataset(case, tmp_path):
    """A run directory and a dataset that were moved; one layer and all; part of the tokens."""
    workdir = copied(case, tmp_path / "run")
    shutil.copytree(case[1].data.dir, tmp_path / "moved")
    values = json.loads((workdir / "config.json").read_text())
    values["data"]["dir"] = str(tmp_path / "gone")
    values["log"]["every_seconds"] = 0.0
    (workdir / "config.json").write_text(json.dumps(values))
    synthetic_study.seal(workdir)
    with pytest.raises(errors.UsageError, match=r"gone: no dataset\.json.*give --data_dir=DIR"):
        measure(workdir, rank_surgery.Request())
    flags = (f"--workdir={workdir}", "--ranks=16,1", "--layers=all,1", "--tokens=160")
    done = command(*flags, f"--data_dir={tmp_path / 'moved'}", "--step=0")
    assert done.returncode == 0, done.stderr
    assert "step 0, 160 validation tokens" in done.stdout
    assert "pass 1/9  batch 1/2  " in done.stdout
    assert "pass 9/9  batch 1/2  " in done.stdout
    assert "pass 9/9  layer 1, random 16: val/loss " in done.stdout
    assert "0:00:00 left" in done.stdout
    assert "dimensions used, to within 0.01 nat: 1 of 16" in done.stdout  # untrained
    rows = (workdir / "rank_surgery" / "step_00000000.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2
    for suffix in ("png", "svg"):
        assert (workdir / "rank_surgery" / f"step_00000000.{suffix}").stat().st_size > 1_000


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"ranks": (4, 17)}, r"--ranks: .*1 to the run's head_dim 16, found \[17\]"),
        ({"ranks": (0,)}, r"--ranks: .*found \[0\]"),
        ({"ranks": ()}, "--ranks: .*found none"),
        ({"layers": ("2",)}, "--layers: .*indices from 0 to 1, found '2'"),
        ({"layers": ()}, "--layers: empty"),
        ({"tokens": -1}, "--tokens: -1"),
        ({"stage": "sideways"}, "--stage: .*pre_rope, post_rope, found 'sideways'"),
        ({"step": 7}, r"--step: .*no checkpoint of step 7. Give one of \[0, 300\]"),
        ({"centring": "half"}, "--centring: .*raw, centred, found 'half'"),
        ({"kinds": ("best",)}, "--kinds: .*top, random, found best"),
        ({"data_dir": "nowhere"}, "nowhere: no dataset.json there"),
    ],
)
def test_wrong_requests_are_refused(case, request_, text):
    with pytest.raises(errors.UsageError, match=text):
        measure(case[0], rank_surgery.Request(**request_))


def test_a_measurement_that_is_there_is_not_overwritten(case, measured):
    path = case[0] / "rank_surgery" / "step_00000300.csv"
    before = path.read_bytes()
    with pytest.raises(errors.UsageError, match=r"step_00000300\.csv: already exists, and no"):
        measure(case[0], rank_surgery.Request(ranks=(8,), layers=("1",), tokens=32))
    assert path.read_bytes() == before


def test_a_measurement_that_was_stopped_resumes_and_ends_in_the_same_bytes(
    case, tmp_path, monkeypatch
):
    """What is stopped is no CSV, and its rows are not measured again."""
    request = rank_surgery.Request(ranks=RANKS, layers=("all",), out=tmp_path / "whole.csv")
    measure(case[0], request)
    stopped = dataclasses.replace(request, out=tmp_path / "stopped.csv")
    part = tmp_path / "stopped.part.json"
    passes, original = [], rank_surgery._Passes.loss

    def loss(self, *arguments):
        passes.append(arguments)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(rank_surgery._Passes, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        measure(case[0], stopped)
    assert not stopped.out.exists() and len(json.loads(part.read_text())["rows"]) == 3
    other = dataclasses.replace(stopped, ranks=(1, 2), seed=5)
    with pytest.raises(errors.UsageError, match=r"part\.json: .* with other seed, settings\. Give"):
        measure(case[0], other)
    lines = []
    rank_surgery.measure(case[0], stopped, report=lines.append)
    assert f"{part}: resumes after 3 of 6 rows" in lines
    assert len(passes) == 4 + 3 and not part.exists()
    assert stopped.out.read_bytes() == request.out.read_bytes()


def test_centred_directions_leave_the_mean_where_it_is(case, tmp_path, monkeypatch):
    """Against numpy: what varies around each head's mean key is projected, before RoPE."""
    reference = Reference(case, monkeypatch)
    keys = reference.keys("pre_rope")
    mean = {place: rows.mean(axis=0) for place, rows in keys.items()}
    directions_of = top({place: rows - mean[place] for place, rows in keys.items()})

    def project(layer, head, now, key_TK):
        if now != "pre_rope":
            return key_TK
        around = key_TK - mean[layer, head]
        directions = directions_of[layer, head][:4]
        return mean[layer, head] + around @ directions.T @ directions

    request = rank_surgery.Request(
        ranks=(4,), layers=("all",), kinds=("top",), centring="centred", out=tmp_path / "one.csv"
    )
    (found,) = measure(case[0], request)
    assert found.val_loss == pytest.approx(reference.loss(project), abs=2e-5)


@pytest.mark.parametrize("text", ["", "layer,stage\n", "{header}\nall,pre_rope\n", "\xff"])
def test_a_damaged_csv_is_refused(tmp_path, text):
    path = tmp_path / "seed_1.csv"
    header = ",".join(rank_curves.Row._fields)
    path.write_text(text.format(header=header), "latin-1")
    with pytest.raises(errors.UsageError, match=r"seed_1\.csv: damaged .*Move it away"):
        rank_curves.read_csv(path)


def test_a_run_of_another_machine_needs_no_cudnn_here(case, measured, tmp_path):
    workdir = copied(case, tmp_path / "run")
    random_run.save_again(workdir, model__attention="cudnn")
    rows = measure(workdir, rank_surgery.Request(ranks=(4,), layers=("all",), tokens=0))
    expected = only(measured["pre_rope"], "all", "top", 4)
    assert only(rows, "all", "top", 4).val_loss == pytest.approx(expected.val_loss, rel=1e-6)


ON_TWO_DEVICES = """
import pathlib, sys
sys.path.insert(0, "tests")
import jax
from qkjax import sharding
from qkjax.trained import rank_surgery, trained_run
open_run, original, sizes = trained_run.open_run, sharding.per_device, set()
def opened(*arguments, **options):
    run = open_run(*arguments, **options)
    sizes.clear()  # of tracing the model for its shapes
    return run
trained_run.open_run = opened
def per_device(function):
    mesh = jax.sharding.get_abstract_mesh()
    sizes.add(1 if mesh.empty else mesh.size)
    return original(function)
sharding.per_device = per_device
request = rank_surgery.Request(ranks=(4,), layers=("all",))
rows = rank_surgery.measure(pathlib.Path({!r}), request, report=lambda line: None).rows
print(sizes, rows[0].val_loss)
"""


@pytest.mark.process
def test_two_devices_share_the_rows_of_a_batch(case, measured, tmp_path, on_devices):
    workdir = copied(case, tmp_path / "run")
    sizes, _, loss = on_devices(ON_TWO_DEVICES.format(str(workdir)), 2).rpartition(" ")
    assert sizes == "{2}"  # every attention of every program
    expected = only(measured["pre_rope"], "all", "top", 4).val_loss
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_another_dataset_is_refused(case, tmp_path):
    other = small_run.make_dataset(tmp_path / "other", seed=1)
    with pytest.raises(errors.UsageError, match="another dataset than the run's"):
        measure(case[0], rank_surgery.Request(data_dir=str(other)))


def test_what_is_no_run_is_refused(case, tmp_path):
    with pytest.raises(errors.UsageError, match=r"not a run directory, expected a config\.json"):
        measure(tmp_path, rank_surgery.Request())
    for name in ("config.json", "environment.json"):
        shutil.copy(case[0] / name, tmp_path)
    for _ in range(2):  # without the directory, then with an empty one
        with pytest.raises(errors.UsageError, match="checkpoints: no checkpoint there"):
            measure(tmp_path, rank_surgery.Request())
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(errors.UsageError, match=r"environment\.json: .*dataset_fingerprint"):
        measure(tmp_path, rank_surgery.Request())


def test_keys_that_are_not_finite_are_refused(case, tmp_path):
    params = restore(case)
    kernel = params["blocks"]["attention"]["key"]["kernel"]
    for value, message in (
        (np.nan, "params/blocks/attention/key/kernel has values that are not finite"),
        (3e38, "keys of step 3 are not finite"),  # sums of a finite kernel
    ):
        kernel[:] = value
        copy = copied(case, tmp_path / f"run {value}", params)
        with pytest.raises(errors.UsageError, match=message):
            measure(copy, rank_surgery.Request(ranks=(1,)))


@pytest.mark.process
def test_flags_are_refused_in_one_line(case):
    for flags, text in (
        ((), "--workdir: missing"),
        ((f"--workdir={case[0]}", "--ranks=1,two"), "--ranks: 'two' is not an integer"),
    ):
        done = command(*flags)
        assert done.returncode == 2
        assert done.stderr.startswith(f"ERROR: {text}") and done.stderr.count("\n") == 1
