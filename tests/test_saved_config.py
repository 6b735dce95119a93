"""--config=RUN/config.json: the same config again, and overrides on top of it."""

import json
import sys

import pytest
from absl import flags

from qkjax import config as config_lib
from qkjax import errors, files
from qkjax.cli import config_flag

RUNS = {
    "full": ("muon", "learned", "full", {}),
    "pilot original": ("adamw", "learned", "pilot,original", {}),
    "small original": ("muon", "learned", "small,original", {}),
    "tau": ("muon", "learned", "pilot,fixed,decayed", {}),
    "to one": ("adamw", "learned", "pilot,fixed,to_one", {}),
    "frozen": ("muon", "learned", "tiny,frozen", {}),
    "clip": ("muon", "none", "tiny,clip", {}),
    "merged": ("muon", "none", "tiny,merged", {}),
    "no second rate": ("adamw", "none", "tiny", {}),
    "repeated steps": ("muon", "none", "full", {"eval.every_tokens": 1, "train.tokens": 10**12}),
    "every and at": (
        "muon",
        "none",
        "tiny",
        {"eval.every_tokens": 9000, "eval.at_tokens": (5000,)},
    ),
    "between steps": ("muon", "none", "tiny", {"checkpoint.every_tokens": 7777}),
    "one step": ("muon", "none", "tiny", {"train.tokens": 1}),
    "traced": ("muon", "none", "tiny", {"profile.steps": (2, 3)}),
}


def read(*argv: str) -> config_lib.Config:
    """The config of a command line."""
    return config_flag.read(parsed(*argv)[1])


def parsed(*argv: str) -> tuple[flags.FlagValues, flags.FlagHolder]:
    values = flags.FlagValues()
    holder = config_flag.define(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *argv])  # ml_collections looks there
        config_flag.parse(values, list(sys.argv))
    return values, holder


def save(config: config_lib.Config, folder, change=lambda values: None) -> str:
    values = files.plain(config.to_dict())
    change(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return f"--config={folder / 'config.json'}"


def make(name: str) -> config_lib.Config:
    optimizer, qk_norm, words, fields = RUNS[name]
    values = config_lib.base(optimizer, qk_norm, words)
    for field, value in fields.items():
        section, _, leaf = field.partition(".")
        values[section][leaf] = value
    return config_lib.resolve(values)


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_config_is_the_same_config_again(name, tmp_path):
    config = make(name)
    again = read(save(config, tmp_path))
    assert again == config or again.to_dict() == config.to_dict()
    assert again.fingerprinted() == config.fingerprinted()
    settled = config.for_platform("cpu")
    assert read(save(settled, tmp_path)) == settled


def test_overrides_act_as_behind_a_config_file(tmp_path, capsys):
    saved = save(make("full"), tmp_path / "a:b [1]")
    for override in ("optimizer.learning_rate=0.5", "eval.final_tokens=7", "seed=3"):
        flag = f"--config.{override}"
        assert read(saved, flag) == read("--config=configs/muon_qk.py:full", flag)
    longer = f"--config.train.tokens={2 * make('full').train.tokens}"
    file = read("--config=configs/muon_qk.py:full", longer)
    assert read(saved, longer).checkpoint == file.checkpoint
    assert read(saved, longer).schedule == file.schedule
    tau = read(save(make("tau"), tmp_path), "--config.optimizer.gamma_decay_tau=2.0")
    assert tau.optimizer.gamma_learning_rate < make("tau").optimizer.gamma_learning_rate
    assert capsys.readouterr().err == ""


def test_a_command_like_this_one_gets_the_same_config(tmp_path):
    """As `qkjax determinism` starts its runs."""
    values, holder = parsed(save(make("tau"), tmp_path), "--config.seed=5")
    assert read(*config_flag.as_flags(values)) == config_flag.read(holder)


@pytest.mark.parametrize("name", ["own:file.py", "own [1].py"])
def test_a_config_file_may_have_any_name(name, tmp_path):
    path = tmp_path / name
    path.write_text(
        "from qkjax import config\ndef get_config(w=''): return config.base('muon', 'none', w)"
    )
    assert read(f"--config={path}:tiny").scale == "tiny"
    assert read(f"--config={path}").scale == "full"


@pytest.mark.parametrize(
    ("change", "override", "message"),
    [
        (lambda v: v.pop("seed"), (), r"config\.json: seed is missing\. Restore"),
        (lambda v: v["train"].update(tokens="x"), (), r"config\.json: train\.tokens is 'x'"),
        (lambda v: v["checkpoint"].update(steps=[0, 3, 4]), (), r"checkpoint.* cannot be set"),
        (lambda v: v.update(arm="muon_qk"), (), r"config\.json: arm cannot be set"),
        (lambda v: None, ("--config.scale=full",), "would only relabel the run"),
        (lambda v: None, ("--config.train.num_steps=3",), "train.num_steps: no such field"),
    ],
)
def test_what_cannot_be_run_again_is_refused(change, override, message, tmp_path):
    with pytest.raises(errors.UsageError, match=message):
        read(save(make("frozen"), tmp_path, change), *override)


def test_words_belong_to_config_files(tmp_path):
    with pytest.raises(errors.UsageError, match=r"config\.json is the config of a run, .*'tiny'"):
        read(save(make("frozen"), tmp_path) + ":tiny")
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(errors.UsageError, match=r"study\.json: damaged \(it is not a JSON object"):
        read(f"--config={tmp_path / 'study.json'}")
    with pytest.raises(errors.UsageError, match="no file"):
        read(f"--config={tmp_path / 'none' / 'config.json'}")


def test_other_numerics_are_said(tmp_path, capsys, monkeypatch):
    saved = save(make("frozen"), tmp_path)
    monkeypatch.setattr(config_lib, "NUMERICS_VERSION", 99)
    assert read(saved).numerics_version == 99
    assert "was trained under numerics_version" in capsys.readouterr().err
