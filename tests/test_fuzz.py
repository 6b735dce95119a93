"""Mutated files and random configs: refused in one line, or taken as what they are.

`tests/mutations.py` makes the worlds and the mutations; docs/reliability.md says more.
"""

import contextlib
import dataclasses
import io
import pathlib
import random
from typing import Any

import mutations
import pytest
import small_run
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkjax import config as config_lib
from qkjax import errors
from qkjax.cli import command_line, config_flag

ROOT = pathlib.Path(__file__).resolve().parents[1]
FEW = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=600)
SEEDS = st.integers(0, 2**32)


# --------------------------------------------------------------------------------------------
# Files.


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> mutations.World:
    return mutations.make_study(tmp_path_factory.mktemp("study") / "study")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> mutations.World:
    return mutations.make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


def check(world: mutations.World, seed: int) -> None:
    faults, _ = mutations.mutate(world, random.Random(seed))
    assert not faults, faults


@FEW
@given(seed=SEEDS)
def test_a_mutated_study_gives_no_other_number(study, seed):
    check(study, seed)


@FEW
@given(seed=SEEDS)
def test_a_mutated_dataset_is_refused_by_its_check_and_by_training(dataset, seed):
    check(dataset, seed)


@pytest.mark.long
@MANY
@given(seed=SEEDS)
def test_many_mutated_studies(study, seed):
    check(study, seed)


@pytest.mark.long
@MANY
@given(seed=SEEDS)
def test_many_mutated_datasets(dataset, seed):
    check(dataset, seed)


@pytest.mark.long
def test_a_mutated_run_is_refused_or_resumes_to_the_same_bits(tmp_path):
    world = mutations.make_runs(tmp_path / "runs")
    chance = random.Random(0)
    faults = [fault for _ in range(100) for fault in mutations.mutate(world, chance)[0]]
    assert not faults, faults


def test_a_world_that_is_not_mutated_has_no_fault_and_a_changed_number_is_one(study):
    """The judge itself: it knows a changed number, a traceback, and one that is told."""
    sound = mutations.outcome(study.commands(study.paths[0])["report"])
    path = study.root / "runs" / "muon_qk" / "seed_42" / "summary.json"

    def found(**fields: Any) -> tuple[str, str] | None:
        return mutations.fault_of(path, study.root, sound, sound._replace(**fields))

    assert sound.code == 0 and found() is None
    assert found(numbers=sound.numbers.replace("3.4", "3.5"))[0] == "silent change"
    assert found(code=1)[0] == "traceback"
    assert found(code=2, said="ERROR: a\nERROR: b\n")[0] == "traceback"
    assert found(code=2, said="ERROR: a: b. Do c.\n") is None
    assert found(numbers="", said=f"{path}: left out\n") is None

    def broken() -> str:
        raise KeyError("of a bug")

    assert mutations.outcome(broken).code == 1


# --------------------------------------------------------------------------------------------
# Configs: every option by the command line, as text.


def options() -> dict[str, config_lib.Option]:
    """Every option by its dotted name."""
    values = config_flag.load(ROOT / "configs" / "muon_qk.py", "tiny")
    names = [
        f"{section}.{name}" if section else name
        for section in ("", *(k for k, v in values.items() if hasattr(v, "items")))
        for name, value in (values[section] if section else values).items()
        if not hasattr(value, "items")
    ]
    return {name: _option(name) for name in names}


def _option(name: str) -> Any:
    section, _, leaf = name.rpartition(".")
    owner = config_lib.Config
    if section:
        owner = next(f.type for f in dataclasses.fields(owner) if f.name == section)
    for field in dataclasses.fields(owner):
        if field.name == leaf and "option" in field.metadata:
            return field.metadata["option"]
        if leaf in field.metadata.get("made_of", {}):
            return field.metadata["made_of"][leaf]
    return None


OPTIONS = options()
TEXTS = st.sampled_from(
    [
        *("0", "1", "-1", "2", "3", "4", "7", "8", "16", "64", "1e-3", "0.5", "1.5", "1e30"),
        *("nan", "inf", "-inf", "true", "false", "none", "None", "", "x", "()", "(1,2)", "(0,)"),
        *("1e400", "9" * 30, "[1]", "{}", "'a'", "\x7f", "ü", "--x", "a=b", "1,2", "0x10"),
    ]
)


def override(name: str) -> st.SearchStrategy[str]:
    """--config.NAME=VALUE: often a value that the option may have."""
    option = OPTIONS[name]
    bound = getattr(option, "bound", None)
    choices = bound.names if isinstance(bound, config_lib.OneOf) else ()
    values = st.one_of(TEXTS, st.sampled_from([str(c) for c in choices])) if choices else TEXTS
    return values.map(lambda value: f"--config.{name}={value}")


OVERRIDES = st.lists(st.sampled_from(sorted(OPTIONS)).flatmap(override), min_size=1, max_size=3)
ARM = st.sampled_from(["muon_qk", "adamw_noqk"])


def read(arm: str, overrides: list[str]) -> tuple[int, str, config_lib.Config | None]:
    """Exit code, standard error and config of a command line."""
    found: list[config_lib.Config] = []

    def work() -> None:
        values = flags.FlagValues()
        holder = config_flag.define(values)
        config_flag.parse(values, ["train", f"--config=configs/{arm}.py:tiny", *overrides])
        found.append(config_flag.read(holder))

    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = command_line.exit_code(work)
    return code, said.getvalue(), found[0] if found else None


@FEW
@given(arm=ARM, overrides=OVERRIDES)
def test_a_command_line_gives_a_config_or_one_error(arm, overrides):
    code, said, config = read(arm, overrides)
    if config is None:
        assert code == 2 and said.count("ERROR: ") == 1, said
    else:
        assert code == 0 and config_lib.from_dict(config.to_dict()) == config
    # A mistake of several fields is several lines of one ERROR.
    assert "Traceback" not in said


@pytest.mark.long
@MANY
@given(arm=ARM, overrides=OVERRIDES)
def test_many_command_lines(arm, overrides):
    test_a_command_line_gives_a_config_or_one_error.hypothesis.inner_test(arm, overrides)


SMALL: dict[str, st.SearchStrategy[Any]] = {
    "model__num_layers": st.integers(1, 2),
    "model__d_model": st.sampled_from([16, 32]),
    "model__num_heads": st.sampled_from([1, 2, 4, 6]),
    "model__num_kv_heads": st.sampled_from([1, 2, 3]),
    "model__head_dim": st.sampled_from([2, 5, 8]),
    "model__d_ff": st.sampled_from([8, 24]),
    "model__mlp": st.sampled_from(["swiglu", "relu2"]),
    "optimizer__clip_norm": st.sampled_from([0.0, 1.0, -1.0]),
    "optimizer__learning_rate": st.sampled_from([0.0, 1e-3, -1e-3]),
    "muon__granularity": st.sampled_from(["merged", "separate", "per_head", "groups_of"]),
    "muon__group_heads": st.integers(0, 3),
    "train__tokens_per_step": st.sampled_from([32, 64, 33]),
    "eval__tokens": st.sampled_from([0, 32, 64]),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("records") / "data")


@pytest.mark.long
@settings(FEW, max_examples=40)
@given(
    fields=st.fixed_dictionaries({}, optional=SMALL),
    optimizer=st.sampled_from(["muon", "adamw"]),
    qk_norm=st.sampled_from(["none", "learned", "frozen"]),
)
def test_a_valid_config_trains_a_step_and_another_is_refused(
    records: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    fields: dict[str, Any],
    optimizer: str,
    qk_norm: str,
):
    from qkjax.train import train_and_evaluate

    given_ = {"eval__at_tokens": (), "checkpoint__every_tokens": 0, **fields}
    given_["train__tokens"] = given_.get("train__tokens_per_step", 64)
    try:
        config = small_run.make_config(
            records, optimizer, qk_norm, **{"train__tokens_per_step": 64, **given_}
        )
    except errors.UsageError as error:
        assert str(error).count("Traceback") == 0
        return
    summary = train_and_evaluate(config, tmp_path_factory.mktemp("run"))
    assert summary["step"] == 1 and not summary["diverged"]
