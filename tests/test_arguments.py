"""arguments: what every command refuses at the door, and ~ where no shell expands it."""

import os
import pathlib
import subprocess
import sys

import pytest

from qkjax import errors
from qkjax.cli import arguments

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--out=~/data"], ["--out={home}/data"]),
        (["--out", "~/data"], ["--out", "{home}/data"]),
        (["~"], ["{home}"]),
        (["--config=~/mine.py:tiny"], ["--config={home}/mine.py:tiny"]),
        (["-config.data.dir=~/d"], ["-config.data.dir={home}/d"]),
        (["--source=jsonl:~/a/*.jsonl:text"], ["--source=jsonl:{home}/a/*.jsonl:text"]),
        (["--prompt=~/ is home"], ["--prompt=~/ is home"]),
        (["--prompt=gs://b"], ["--prompt=gs://b"]),
        (["--prompt", "~/ is home"], ["--prompt", "~/ is home"]),
        (["--prompt=one\n\ttwo"], ["--prompt=one\n\ttwo"]),
        (["--out=a~b", "--only=runs/*"], ["--out=a~b", "--only=runs/*"]),
        (
            ["--source=text:ü/日本語/a\N{NO-BREAK SPACE}b"],
            ["--source=text:ü/日本語/a\N{NO-BREAK SPACE}b"],
        ),
    ],
)
def test_a_tilde_is_the_home_folder_wherever_a_value_begins(given, expected, home):
    found = arguments.check(["~/qkjax", *given], texts=["prompt"])
    assert found == ["~/qkjax", *(text.replace("{home}", str(home)) for text in expected)]


@pytest.mark.parametrize("given", [["--out=gs://b/x"], ["--out", "s3://b/x"], ["s3://b/x"]])
def test_a_bucket_passes_where_the_command_serves_it(given):
    assert arguments.check(["qkjax", *given], buckets=["out", ""]) == ["qkjax", *given]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--out=data\r"], r"--out: data\r ends with a carriage return. Save the script"),
        (["--out", "data\r"], r"--out: data\r ends with a carriage return."),
        (["a\r"], r"argument: a\r ends with a carriage return."),
        (["--workdir=a\x1b[2Jb"], r"--workdir: a\x1b[2Jb holds a control character. Remove it."),
        (["--workdir=a\nb"], r"--workdir: a\nb holds a control character."),
        (["--out=a\N{LINE SEPARATOR}"], r"--out: a\u2028 holds a control character."),
        (["--source=text:caf\udce9"], r"--source: text:caf\xe9 holds bytes that are not UTF-8."),
        (["--prompt=caf\udce9"], r"--prompt: caf\xe9 holds bytes that are not UTF-8."),
        (["--prompt=\x07"], r"--prompt: \x07 holds a control character."),
        (["--config.data.dir=x\r"], r"--config.data.dir: x\r ends with"),
        (
            ["--workdir=gs://b/run"],
            "--workdir: gs://b/run is in a bucket, expected a local path: a",
        ),
        (
            ["--config.d.dir", "s3://b/d"],
            "--config.d.dir: s3://b/d is in a bucket, expected a local",
        ),
        (["--out=az://b/run"], "--out: az://b/run is in a bucket, expected one at gs:// or s3://."),
        (["--out=x,s3://b/run"], "--out: x,s3://b/run is in a bucket, expected one at gs://"),
        (["--source=jsonl:S3://b/*.jsonl"], "--source: jsonl:S3://b/*.jsonl is in a bucket"),
        (["gs://b/run"], "argument: gs://b/run is in a bucket"),
    ],
)
def test_what_no_path_should_hold_is_refused_in_one_printable_line(given, message):
    with pytest.raises(errors.UsageError) as caught:
        arguments.check(["qkjax", *given], texts=["prompt"], buckets=["out"])
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("given", ["jsonl:naïve/a.jsonl", "jsonl:naïv*/a.jsonl", "jsonl:*/a.jsonl"])
@pytest.mark.process
def test_a_locale_that_misreads_names_is_named_and_not_the_name(given, home):
    """LC_ALL=C without UTF-8 mode: the bytes are sound, Python takes them for no letters."""
    (home / "naïve").mkdir()
    (home / "naïve" / "a.jsonl").write_text('{"text": "One."}\n')
    found = subprocess.run(
        [
            *(sys.executable, "-m", "qkjax.commands", "prepare", "--tokenizer=train:300"),
            *("--out=d", f"--source={given}"),
        ],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert found.stderr.endswith("in this locale (ascii). Set PYTHONUTF8=1.\n")
    assert found.stderr.count("\n") == 1
