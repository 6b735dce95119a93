"""`python -m qkjax.main` with mistakes: one line that helps, the right exit code, no jax."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "--config=configs/muon_noqk.py:tiny"
# The packages that take seconds to import. In this test they cannot be imported at all.
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "clu")


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs the real command where importing a heavy package raises; the finished process."""
    poison = tmp_path_factory.mktemp("poison")
    for name in HEAVY:
        (poison / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "qkjax.main", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(poison), "PATH": "", "HOME": str(poison)},
        )

    return run


def test_a_sound_command_line_would_import_jax(call, tmp_path):
    """The guard of the tests below: they would notice an import of jax."""
    done = call(CONFIG, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert re.search("AssertionError: (jax|flax|optax) was imported", done.stderr)


MISTAKES = {
    "unknown field": (
        (CONFIG, "--config.optimizer.learing_rate=0.1"),
        "--config.optimizer.learing_rate: no such field. Did you mean 'learning_rate'? Known: ",
    ),
    "unknown section": (
        (CONFIG, "--config.optimiser.learning_rate=0.1"),
        "--config.optimiser.learning_rate: no such field.",
    ),
    "unknown word": (
        ("--config=configs/muon_noqk.py:tiny,orignal",),
        "--config: unknown word 'orignal' after the colon. Did you mean 'original'? Known: scales",
    ),
    "the recipe's former name": (
        ("--config=configs/muon_noqk.py:tiny,seed",),
        "--config: the recipe 'seed' is called 'original' now. Write 'original' after the colon.",
    ),
    "a word without effect": (
        ("--config=configs/muon_qk.py:tiny,undecayed",),
        "--config: the word 'undecayed' changes nothing in recipe fixed",
    ),
    "missing file": (
        ("--config=configs/muon_qknorm.py:tiny",),
        "--config: no file configs/muon_qknorm.py. Configs here: configs/adamw_noqk.py",
    ),
    "syntax error": (("--config={tmp}/broken.py",), "{tmp}/broken.py:2: "),
    "no get_config": (
        ("--config={tmp}/empty.py",),
        "{tmp}/empty.py: no function get_config. A config file defines",
    ),
    "a config that raises": (
        ("--config={tmp}/raises.py",),
        "{tmp}/raises.py:2: ZeroDivisionError: division by zero. Mend the config file.",
    ),
    "stray positional": (
        (CONFIG, "--workdir=x", "config.model.qk_norm=none"),
        "config.model.qk_norm=none: a stray argument, which nothing reads. Write options as",
    ),
    "wrong type": ((CONFIG, "--config.seed=abc"), "flag --config.seed=abc: "),
    "a fraction for an integer": ((CONFIG, "--config.seed=1.5"), "flag --config.seed=1.5: "),
    "several fields": (
        (CONFIG, "--config.model.head_dim=0", "--config.muon.scale=big"),
        "config: muon.scale is 'big', it must be one of spectral, rms; "
        "model.head_dim is 0, it must be above 0",
    ),
    "recipe by override": (
        (CONFIG, "--config.recipe=original"),
        "--config.recipe: an override would only relabel the run. Write the word after",
    ),
    "recipe by override, one dash": (
        (CONFIG, "-config.scale=full"),
        "--config.scale: an override would only relabel the run. Write the word after",
    ),
    "missing file behind a space": (
        ("--config", "configs/muon_qknorm.py:tiny"),
        "--config: no file configs/muon_qknorm.py. Configs here: configs/adamw_noqk.py",
    ),
    "no get_config behind a space": (
        ("-config", "{tmp}/empty.py"),
        "{tmp}/empty.py: no function get_config. A config file defines",
    ),
    "unknown flag": ((CONFIG, "--wrokdir=x"), "Unknown command line flag 'wrokdir'. Did you mean"),
    "no config": (("--workdir=x",), "--config: missing. Pass a config file"),
    "no workdir": ((CONFIG,), "--workdir: missing. Name the run directory"),
    "no dataset": (
        ("--config=configs/muon_noqk.py", "--workdir={tmp}/run"),
        "data.dir: scale full needs a prepared dataset. Make one with `python "
        "tools/prepare_data.py",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(mistake, call, tmp_path):
    (tmp_path / "broken.py").write_text("import qkjax\ndef get_config(:\n")
    (tmp_path / "empty.py").write_text("learning_rate = 0.1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    arguments, expected = MISTAKES[mistake]
    done = call(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ERROR: " + expected.replace("{tmp}", str(tmp_path)))
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_help_names_every_flag(call):
    done = call("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Trains one arm: python -m qkjax.main --config=")
    for flag in ("--config", "--workdir", "--restore_step", "--allow_config_change", "debug"):
        assert flag in done.stdout


def test_debug_shows_the_traceback(call):
    done = call(CONFIG, "--config.muon.scale=big", "--workdir=x", "--debug")
    assert done.returncode == 2  # the code is a contract, --debug or not
    assert "Traceback (most recent call last)" in done.stderr
    assert "UsageError: config: muon.scale is 'big'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ERROR: config: muon.scale is 'big'")


def test_integers_may_have_an_exponent(call):
    """The message shows what was read: whole numbers as integers, others as they are."""
    done = call(
        CONFIG,
        "--config.train.tokens_per_step=1e6",
        "--config.model.d_model=0.96e2",
        "--config.muon.granularity=merged",
        "--config.optimizer.warmup_fraction=9e-1",
    )
    assert done.returncode == 2
    assert "train.tokens_per_step is 1000000, it must be a multiple of" in done.stderr
    assert "optimizer.warmup_fraction is 0.9, it must be at most 1 - " in done.stderr
    assert "muon.granularity is 'merged'" in done.stderr
    done = call(CONFIG, "--config.data.dir=8e12ab", "--print_config")  # not a number
    assert json.loads(done.stdout)["data"]["dir"] == "8e12ab"


def test_value_after_a_space_is_read_too(call):
    """`--field value` never leaves the treatment at its default without a word."""
    done = call(CONFIG, "--config.model.qk_norm", "laerned")
    assert done.returncode == 2
    assert "model.qk_norm is 'laerned'" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_a_reader_that_leaves_early_gets_no_traceback(flag):
    """As `| head` does; the pipe is closed before the command writes."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "qkjax.main", CONFIG, flag],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
