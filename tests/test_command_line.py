"""The commands with mistakes: one line that helps, the right exit code, no jax."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from qkjax import commands
from qkjax.cli import command_line

pytestmark = pytest.mark.process
ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "--config=configs/muon_noqk.py:tiny"
# The packages that take seconds to import. In this test they cannot be imported at all.
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "clu")
try:
    compile("\0", "nul.py", "exec")
except (SyntaxError, ValueError) as error:
    NUL_ERROR = type(error).__name__


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs the real command where importing a heavy package raises; the finished process."""
    poison = tmp_path_factory.mktemp("poison")
    for name in HEAVY:
        (poison / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")

    def run(*arguments, start=("-m", "qkjax.main"), cwd=ROOT, **variables):
        path = f"{poison}{os.pathsep}{ROOT}"
        return subprocess.run(
            [sys.executable, *start, *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={"PYTHONPATH": path, "PATH": "", "HOME": "/home/me", **variables},
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
        "--config.optimizer.learing_rate: no such field. "
        "Did you mean 'optimizer.learning_rate'? Known: ",
    ),
    "unknown section": (
        (CONFIG, "--config.optimiser.learning_rate=0.1"),
        "--config.optimiser.learning_rate: no such field. "
        "Did you mean 'optimizer.learning_rate'? Known: ",
    ),
    "field without its section": (
        (CONFIG, "--config.tokens=4e3"),
        "--config.tokens: no such field. Did you mean 'eval.tokens' or 'train.tokens'? Known: ",
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
        ("--config=configs/muon_noqk.py:tiny,separate",),
        "--config: the word 'separate' changes nothing in recipe fixed",
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
        "{tmp}/raises.py:2: ZeroDivisionError: division by zero. Fix the config file.",
    ),
    "a config that leaves": (
        ("--config={tmp}/leaves.py:tiny",),
        "{tmp}/leaves.py:3: SystemExit: 3. Fix the config file.",
    ),
    "a config without words": (
        ("--config={tmp}/raises.py:tiny",),
        "{tmp}/raises.py: TypeError: get_config() takes 0 positional arguments but 1 was given.",
    ),
    "a config that returns nothing": (
        ("--config={tmp}/nothing.py",),
        "{tmp}/nothing.py: get_config returned NoneType, expected a ConfigDict. Return",
    ),
    "a config with a NUL": (
        ("--config={tmp}/nul.py",),
        # A ValueError before Python 3.11.4.
        f"{{tmp}}/nul.py: {NUL_ERROR}: source code string cannot contain null bytes.",
    ),
    "a tuple cut short": (
        (CONFIG, "--config.eval.at_tokens=(1,"),
        "flag --config.eval.at_tokens=(1,: ",
    ),
    "a section for a field": ((CONFIG, "--config.model=3"), "--config.model: no such field."),
    "stray positional": (
        (CONFIG, "--workdir=x", "config.model.qk_norm=none"),
        "config.model.qk_norm=none: an unexpected argument, which nothing reads. Write options as",
    ),
    "wrong type": ((CONFIG, "--config.seed=abc"), "flag --config.seed=abc: "),
    "a fraction for an integer": ((CONFIG, "--config.seed=1.5"), "flag --config.seed=1.5: "),
    "several fields": (
        (CONFIG, "--config.model.head_dim=0", "--config.muon.scale=big"),
        "config: model.head_dim is 0, it must be above 0 and below 2**31; "
        "muon.scale is 'big', it must be one of spectral, rms, mup",
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
    "a price of no hours": (
        (CONFIG, "--dry_run", "--price_per_hour=2.5"),
        "--price_per_hour: is the price of a target's hours, and no target is named. Add --aot=",
    ),
    "unknown flag": ((CONFIG, "--wrokdir=x"), "Unknown command line flag 'wrokdir'. Did you mean"),
    "no config": (("--workdir=x",), "--config: missing. Pass a config file"),
    "no workdir": ((CONFIG,), "--workdir: missing. Name the run directory"),
    "no dataset": (
        ("--config=configs/muon_noqk.py", "--workdir={tmp}/run"),
        "data.dir: scale full needs a prepared dataset. Make one with `qkjax prepare",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(mistake, call, tmp_path):
    (tmp_path / "broken.py").write_text("import qkjax\ndef get_config(:\n")
    (tmp_path / "empty.py").write_text("learning_rate = 0.1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\ndef get_config(words):\n    sys.exit(3)\n")
    (tmp_path / "nothing.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "nul.py").write_text("def get_config():\n    \0\n")
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


@pytest.mark.parametrize("unbuffered", ["", "1"])  # python's own default is ""
@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_a_reader_that_leaves_early_gets_no_traceback(flag, unbuffered):
    """As `| head` does; the pipe is closed before the command writes."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "qkjax.main", CONFIG, flag],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_console_command_lists_its_verbs(call):
    console = ("-m", "qkjax.commands")
    done = call("--help", start=console)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^  ([a-z]+) ", done.stdout, re.MULTILINE) == list(commands.VERBS)
    assert call(start=console).stdout == done.stdout
    modules = {path.stem for path in (ROOT / "qkjax" / "commands").glob("[!_]*.py")}
    assert modules == set(commands.VERBS)
    assert call("--version", start=console).stdout == "0.1.0\n"
    wrong = call("stduy", "--workdir=x", start=console)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("ERROR: stduy: no such command. Did you mean 'study'? Known: ")


@pytest.mark.parametrize("verb", [verb for verb in commands.VERBS if verb != "train"])
def test_a_tool_is_its_verb(verb, call):
    """tools/*.py run this checkout, not what is installed, and know the same flags."""
    texts = {path: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    [tool] = [path for path, text in texts.items() if f'commands.run("{verb}")' in text]
    shown = call("--help", start=(tool,), cwd="/", PYTHONPATH="")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"qkjax {verb}" in shown.stdout and "--[no]debug" in shown.stdout
    assert call(verb, "--help", start=("-m", "qkjax.commands")).stdout == shown.stdout


def test_a_config_that_comes_with_qkjax_is_taken_by_name_and_said(call, tmp_path):
    for name in ("muon_noqk", "configs/muon_noqk.py"):
        done = call(f"--config={name}:tiny", "--print_config", cwd=tmp_path)
        assert json.loads(done.stdout)["arm"] == "muon_noqk"
        place = ROOT / "configs" / "muon_noqk.py"
        assert done.stderr == f"config: {place}, because there is no file {name} here\n"
    own = (ROOT / "configs" / "adamw_qk.py").read_text()
    (tmp_path / "muon_noqk").write_text(own)  # one's own file, by any name
    done = call("--config", "muon_noqk:tiny", "--print_config", cwd=tmp_path)
    assert json.loads(done.stdout)["arm"] == "adamw_qk" and done.stderr == ""


def test_paths_are_checked_and_completed_at_the_door(call):
    done = call(CONFIG, "--config.data.dir=~/data", "--print_config")
    assert json.loads(done.stdout)["data"]["dir"] == "/home/me/data"
    done = call(CONFIG, "--workdir=runs/a\r")
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR: --workdir: runs/a\\r ends with a carriage return.")
    done = call(CONFIG, b"--workdir=caf\xe9")
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR: --workdir: caf\\xe9 holds bytes that are not UTF-8.")


def test_a_pipe_has_every_line_at_once(call):
    """What is still in a buffer at os._exit is lost."""
    source = """
import os
from absl import flags
from qkjax.cli import command_line
def work():
    print("preparing")
    os._exit(0)
command_line.run(work, flags.FlagValues(), "")
"""
    assert call(start=("-c", source)).stdout == "preparing\n"


@pytest.mark.skipif(pathlib.Path("/dev/nvidia0").exists(), reason="here is a GPU")
@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_a_platform_that_is_not_here_is_one_line(platform, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qkjax.main", CONFIG, "--dry_run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platform},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"ERROR: JAX_PLATFORMS: jax finds no device of '{platform}' here")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


PRINT = "from absl import flags; from qkjax.cli import command_line; command_line.run("


def test_a_terminal_that_is_not_utf_8_gets_escapes(call):
    code = f"{PRINT}lambda: print('\u2581 é'), flags.FlagValues(), '')"
    done = call(start=("-c", code), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\u2581 \\xe9\n"), done.stderr


def test_a_failure_of_the_disk_that_nothing_foresaw_names_its_file(tmp_path, capsys):
    missing = tmp_path / "no" / "file"
    assert command_line.exit_code(lambda: int(missing.read_text())) == 4
    assert capsys.readouterr().err == (
        f"ERROR: {missing}: cannot be read or written (No such file or directory). "
        "Check the path and its file system, then run the same command again.\n"
    )
