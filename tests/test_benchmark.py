"""The benchmark: peers that do the same work, refusal of those that do not, noise, a smoke."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_model
import small_run

from benchmarks import interleave, subjects, table
from qkjax import config as config_lib
from qkjax import errors

pytestmark = pytest.mark.long  # outside the package
ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {
    **small_model.SMALL,
    "train.tokens_per_step": 64,
    "train.loss_chunk_tokens": 40,
    "optimizer.warmup_fraction": 0.0,
    "optimizer.decay_fraction": 0.0,
}


def small(arm: str, **changes):
    optimizer, _, qk = arm.partition("_")
    values = config_lib.base(optimizer, "learned" if qk == "qk" else "none", "tiny")
    values.update_from_flattened_dict(SMALL | changes)
    return config_lib.resolve(values).for_platform("cpu")


def make_spec(settings, folder: pathlib.Path):
    """What a worker of a small step gets."""
    interleave.write_inputs(settings, folder)
    inputs = str(folder / "inputs.npz")
    return {"config": settings.to_dict(), "platform": "cpu", "inputs": inputs}


@pytest.fixture(scope="module")
def adamw_spec(tmp_path_factory):
    return make_spec(small("adamw_qk"), tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def muon_spec(tmp_path_factory):
    settings = small("muon_noqk", **{"model.mlp": "relu2"})
    return make_spec(settings, tmp_path_factory.mktemp("inputs"))


def parameters(work) -> dict[str, np.ndarray]:
    """The project's parameters by name; the peer's likewise, stacked and turned."""
    import jax

    from qkjax import model
    from qkjax.runs import checkpoint

    if hasattr(work, "_state"):
        names = checkpoint.leaf_names(work._state.params)
        leaves = jax.tree.leaves(work._state.params)
        return dict(zip(names, map(np.asarray, leaves), strict=True))
    found = {}
    for name in checkpoint.leaf_names(model.parameter_shapes(work.config.model)):
        inner = name.removeprefix("blocks/").replace("/kernel", "/weight").replace("/", ".")
        sources = work.model.blocks if name.startswith("blocks/") else [work.model]
        values = [source.get_parameter(inner).detach().numpy() for source in sources]
        values = [v.T if inner.endswith("weight") else v for v in values]
        found[name] = np.stack(values) if name.startswith("blocks/") else values[0]
    return found


@pytest.mark.parametrize("arm", ["adamw", "muon"])
def test_the_peer_trains_as_the_project_does(arm, request):
    spec = request.getfixturevalue(f"{arm}_spec")
    pytest.importorskip("torch")
    from benchmarks import jax_work, torch_work

    ours, theirs = jax_work.Step(spec), torch_work.Step(spec)
    interleave.check_agreement({"jax": ours.first(), "torch": theirs.first()}, 1e-5)
    ours.repeat(2)
    theirs.repeat(2)
    expected, found = parameters(ours), parameters(theirs)
    start = np.load(spec["inputs"])
    for name, value in expected.items():
        moved = np.abs(value - start[f"params/{name}"]).mean()
        assert moved > 0, name
        # Mean and not maximum: AdamW's first steps divide gradients near 0 by themselves.
        assert np.abs(value - found[name]).mean() < 1e-2 * moved, name


def test_the_peers_chunked_loss_is_the_plain_one(adamw_spec):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_work

    work = torch_work.BestStep(adamw_spec)
    gradients = []
    for loss in (work.plain_loss, work.chunked_loss):
        work.model.zero_grad()
        value = loss(work._tokens)
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in work.model.parameters())])
    for plain, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("subject", ["optimizer", "attention", "loss", "eval"])
def test_the_variants_of_a_subject_do_the_same_work(subject, muon_spec):
    pytest.importorskip("torch")
    found = {}
    for variant in subjects.choose_variants(subject, "cpu", []):
        module, cls = subjects.work_class(subject, variant)
        work = getattr(importlib.import_module(module), cls)(muon_spec)
        found[variant] = work.first()
        work.repeat(1)
    assert len(found) >= 2
    interleave.check_agreement(found, 1e-5)


@pytest.fixture(scope="module")
def run_spec(tmp_path_factory):
    """What a worker of `run` gets, with a real dataset."""
    folder = tmp_path_factory.mktemp("run")
    settings = small_run.make_config(
        small_run.make_dataset(folder / "dataset"),
        optimizer__warmup_fraction=0.0,
        optimizer__decay_fraction=0.0,
    ).for_platform("cpu")
    return make_spec(settings, folder)


def test_a_run_and_its_bare_steps_begin_alike(run_spec):
    found = {}
    for variant in subjects.choose_variants("run", "cpu", []):
        module, cls = subjects.work_class("run", variant)
        found[variant] = getattr(importlib.import_module(module), cls)(run_spec).first()
    assert set(found) == {"steps", "start", "run"}
    interleave.check_agreement(found, 1e-6)


def test_a_measured_run_evaluates_and_saves_at_every_interval(run_spec, monkeypatch):
    from benchmarks import run_work

    monkeypatch.setattr(run_work, "STEPS", 4)
    rows = run_work.Run(run_spec).train(intervals=2)
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 4, 8]
    settings = run_work.lengthen(config_lib.from_dict(run_spec["config"]), 2)
    assert settings.checkpoint.steps == (0, 4, 8, 9)
    # A tenth of 4 steps of 4 sequences of 32 tokens, in whole sequences.
    assert settings.eval.tokens == 2 * 32 and settings.eval.final_tokens == -1
    assert [row["step"] for row in run_work.Start(run_spec).train(intervals=0)] == [0, 1]


def test_a_run_is_compared_without_its_start(run_spec):
    request = interleave.Request(
        "run", ("steps", "start", "run"), config_lib.from_dict(run_spec["config"]), "cpu", 2, 0.0
    )
    rounds = {"steps": (4.0, 4.0), "start": (1.0, 3.0), "run": (5.2, 7.6)}
    outcomes = {
        name: interleave.Outcome(values[0], 1.0, 1, 1.0, values) for name, values in rounds.items()
    }
    measured = interleave.Measurement(request, 1, None, 1, {}, 0.0, outcomes)
    assert measured.net_ratio == pytest.approx((1.05 + 1.15) / 2)
    assert "\nrun less start: 1.100 of steps\n" in table.format_table(measured)
    assert measured.to_dict()["net_ratio"] == measured.net_ratio
    alone = dataclasses.replace(measured, outcomes={"run": outcomes["run"]})
    assert alone.net_ratio is None


@pytest.mark.parametrize("number", ["loss", "grad_norm"])
def test_numbers_that_differ_are_refused(number):
    right = {"loss": 8.0, "grad_norm": 0.4}
    close = {key: value * (1 + 5e-5) for key, value in right.items()}
    assert interleave.check_agreement({"a": right, "b": close}, 1e-4) == right
    for wrong in (right[number] * (1 + 2e-4), float("nan")):
        with pytest.raises(errors.UsageError, match=rf"{number} .* in c and .* in a.*no times"):
            found = {"a": right, "b": close, "c": {**right, number: wrong}}
            interleave.check_agreement(found, 1e-4)


def test_the_noise_floor_covers_what_one_variant_differs_from_itself():
    assert interleave.noise_floor([1.0] * 5) == 0
    assert interleave.noise_floor([1.03] * 5) == pytest.approx(0.03)
    # Median 1, median absolute deviation 0.01, 4 ratios.
    expected = 2 * 1.2533 * 1.4826 * 0.01 / 2
    assert interleave.noise_floor([0.99, 0.99, 1.01, 1.01]) == pytest.approx(expected)
    assert table.verdict(1.02, 0.03) == table.verdict(0.98, 0.03) == "equal"
    assert (table.verdict(1.04, 0.03), table.verdict(0.96, 0.03)) == ("slower", "faster")


def test_rates_name_both_conventions_of_mfu():
    full = subjects.make_config("full", "adamw_qk", "gpu", None)
    request = interleave.Request("step", ("jax",), full, "gpu", 1, 0.0)
    measured = interleave.Measurement(request, 87_909_632, "NVIDIA H200", 1, {}, 0.0, {})
    # 65,536 tokens in 0.1 s; 804.3 and 665.9 MFLOP a token of 989 TFLOP/s.
    expected = {"tokens/s": "655,360", "MFU (PaLM)": "53.3%", "MFU (causal)": "44.1%"}
    assert table.rates(measured, 0.1) == expected
    unknown = dataclasses.replace(measured, device=None)
    assert list(table.rates(unknown, 0.1)) == ["tokens/s"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/run.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.process
def test_the_command_measures_and_writes_a_table_and_json(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "step.json"
    done = run("step", "--sequences=1", "--rounds=2", "--block_seconds=0", f"--out={out}")
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert set(written["outcomes"]) == {"jax", "torch", "jax again"}
    for name, outcome in written["outcomes"].items():
        assert f"\n{name} " in done.stdout
        assert len(outcome["rounds"]) == 2 and min(outcome["rounds"]) > 0
        assert outcome["peak_bytes"] > 1e8
    assert written["outcomes"]["torch"]["ratio"] == 1
    assert set(written["agreed"]) == {"loss", "grad_norm"}
    assert f"noise floor {written['noise']:.3f}" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "speed: unknown benchmark"),
        (["step", "--variants=jax,tensorflow"], "'tensorflow' is no variant of step"),
        (["step", "--out=nowhere/x.json"], "no folder nowhere"),
    ],
)
def test_mistakes_are_named(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_variant_that_fails_is_named_with_its_words(tmp_path):
    request = interleave.Request(
        "attention", ("cudnn",), small("adamw_qk"), "cpu", rounds=1, block_seconds=0.0
    )
    with pytest.raises(errors.UsageError, match=r"variant cudnn failed: RuntimeError: cuDNN is"):
        interleave.measure(request, tmp_path, report=lambda line: None)


def test_shapes_are_what_the_tables_say():
    described = subjects.describe(subjects.make_config("small", "adamw_qk", "cpu", None))
    assert (described["layers"], described["d_model"]) == (6, 256)
    assert (described["sequence_length"], described["sequences"]) == (512, 8)
    full = subjects.make_config("full", "muon_noqk", "gpu", None)
    assert full.train.tokens_per_step == 65_536 and full.model.dtype == "bfloat16"
    assert dataclasses.replace(full.schedule, num_steps=1).factor(0) == 1  # no warm-up
